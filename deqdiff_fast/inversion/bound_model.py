"""The arguments of a model told apart once: those of the images, and those that all images share."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from .._types import Model, Shared
from ..model.knowledge import base_of
from ..model.sample_kwargs import is_per_sample, is_whole


class BoundModel:
    """A model called with the tensors that have one row for each image; all other arguments are fixed.

    A part of the images is a smaller batch, by whose size alone nobody can tell which tensors belong to images.
    """

    def __init__(self, model: Model, leaves: list[Any], structure: TreeSpec, rows: list[int]) -> None:
        """leaves, structure: of the arguments; rows: which leaves belong to the images."""
        self.model, self.base_model = model, base_of(model)
        self.deqdiff_ranks = getattr(model, "deqdiff_ranks", None)
        if getattr(model, "takes_marks", False):
            whole = (Tensor, list, tuple)  # what has as many entries as a call has rows may be one for all images
            leaves = [x if k in rows or not isinstance(x, whole) else Shared(x) for k, x in enumerate(leaves)]
        self.leaves, self.structure, self.rows = leaves, structure, rows

    def __call__(self, x: Tensor, t: Tensor, *, rows: list[Any]) -> Any:
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
    leaves, structure = tree_flatten(kwargs, is_leaf=lambda value: is_whole(value, batch))
    smaller = any(isinstance(x, Tensor) and x.dim() > 0 and 0 < x.size(0) < batch for x in leaves)
    if guided is None and not smaller:
        return model, kwargs
    rows = [k for k, leaf in enumerate(leaves) if is_per_sample(leaf, batch)]
    plain = [leaf.value if isinstance(leaf, Shared) else leaf for leaf in leaves]
    return BoundModel(model, plain, structure, rows), {"rows": [leaves[k] for k in rows]}
