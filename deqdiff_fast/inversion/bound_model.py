"""The arguments of a model told apart once: those of the images, and those that all images share."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from .._types import Model


class BoundModel:
    """A model called with the tensors that have one row for each image; all other arguments are fixed.

    A part of the images is a smaller batch, by whose size alone nobody can tell which tensors belong to images.
    """

    def __init__(self, model: Model, model_kwargs: dict[str, Any], rows: list[int]) -> None:
        """rows: which leaves of model_kwargs belong to the images."""
        self.model, self.base_model = model, getattr(model, "base_model", model)
        self.leaves, self.structure = tree_flatten(model_kwargs)
        self.rows = rows

    def __call__(self, x: Tensor, t: Tensor, *, rows: list[Tensor]) -> Any:
        leaves = list(self.leaves)
        for at, value in zip(self.rows, rows, strict=True):
            leaves[at] = value
        return self.model(x, t, **tree_unflatten(leaves, self.structure))


def bind(model: Model, batch: int, model_kwargs: dict[str, Any] | None) -> tuple[Model, dict[str, Any]]:
    """(model, model_kwargs) of which any part of the batch can be taken: by `select_rows`, with the same meaning."""
    kwargs = dict(model_kwargs or {})
    guided = getattr(model, "bind_batch", None)
    if guided is not None:
        kwargs = guided(batch, kwargs)
    leaves = tree_flatten(kwargs)[0]
    sizes = [x.shape[0] if isinstance(x, Tensor) and x.dim() > 0 else 0 for x in leaves]
    if guided is None and not any(0 < size < batch for size in sizes):
        return model, kwargs
    rows = [k for k, size in enumerate(sizes) if size == batch]
    return BoundModel(model, kwargs, rows), {"rows": [leaves[k] for k in rows]}
