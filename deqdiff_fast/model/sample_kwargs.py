"""Model arguments that belong to the samples of a batch."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map


def select_kwargs(model_kwargs: dict[str, Any] | None, sample: Tensor, batch: int) -> dict[str, Any]:
    """model_kwargs for rows of the given samples.

    Args:
        model_kwargs: any nesting; a tensor whose first dimension is `batch` has one entry for each sample.
        sample: (n,) int64, on any device.
        batch: samples that `model_kwargs` are for.

    Returns:
        The same nesting; per-sample tensors have first dimension n, everything else is as it was.
    """

    def select(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == batch:
            return value.index_select(0, sample.to(value.device))
        return value

    selected: dict[str, Any] = tree_map(select, model_kwargs or {})
    return selected
