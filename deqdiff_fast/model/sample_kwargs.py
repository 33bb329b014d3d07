"""Values that belong to the samples of a batch, picked for rows of it."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map


def select_rows(values: Any, batch: int, rows: Tensor) -> Any:
    """`values` with every tensor of first dimension `batch` indexed by `rows`: (n,), in nested containers too."""

    def select(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == batch:
            return value.index_select(0, rows.to(value.device))
        return value

    return tree_map(select, values)
