"""A model whose calls are shared out over the ranks of a group."""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .._types import Model, Shared, parameters_of, unwrap_output, without_marks
from ..errors import ModelOutputError
from ..model.guidance import Guided
from ..model.knowledge import base_of
from .group import Ranks
from .row_gather import DTYPES, MOST_AXES, RowGather, checksum, kind_of
from .sharded_gradient import call_with_gradient
from .shares import own_arguments, share_of


def sharded(model: Model, group: Any = "world") -> Model:
    """The same model, each of its calls shared out over the ranks of a group.

    Every rank calls it with the same arguments and is returned all rows, bit for bit the same on all ranks; it makes
    its own share only: a call on 9 rows is one of 3, 2, 2 and 2 rows on four ranks. One all-gather a call, in the dtype
    of the model's output; the first call of a kind asks for the form of a row as well. Differentiable like the model;
    `backward` then has to be called on all ranks, for the same loss.

    One solve at a time on a group; see "Several devices" in the documentation. `DEQSampler(group=...)` and
    `DEQInverter(group=...)` use this; it is there by itself for a solver of one's own.

    Args:
        model: as for `DEQSampler`, the same on all ranks, on each rank's own device. Of a guided model the two halves
            are rows of their own.
        group: a torch.distributed ProcessGroup, a DeviceMesh of one dimension, or "world" (made where torchrun has
            started the process and nobody has called init_process_group). Its timeout is that of every exchange.

    Returns:
        A model `model(x, t, **model_kwargs)`. Tensors and lists of strings in the arguments that have one entry for
        each row of x are shared out with the rows; `shared` marks those that only look like that.

    Raises:
        TypeError, ValueError: a bad argument. The model raises on all ranks whatever went wrong on one: RankError,
            ModelOutputError, torch.OutOfMemoryError or KeyboardInterrupt; RankError also where ranks were called with
            other rows, or one has died or hangs for longer than the timeout.
    """
    if not callable(model):
        raise TypeError(f"model: expected a callable model(x, t, ...), got {type(model).__name__}")
    ranks = Ranks.of(group)
    known = getattr(model, "deqdiff_ranks", None)
    if known is not None:
        if known is not ranks:
            raise ValueError("group: expected the group that the model is shared out over already, got another one")
        return model
    if isinstance(model, Guided):
        halves = copy(model)
        halves.model = sharded(model.model, group)
        return halves
    return ShardedModel(model, ranks)


def unshared(model: Model) -> Model:
    """What `sharded` was given."""
    if isinstance(model, ShardedModel):
        return model.model
    if isinstance(model, Guided):
        halves = copy(model)
        halves.model = unshared(model.model)
        return halves
    return model


class ShardedModel:
    """See `sharded`; in everything but its calls the model itself."""

    takes_marks = True  # the sampler leaves `shared` in the arguments: what has a row for each call's row is cut

    def __init__(self, model: Model, ranks: Ranks) -> None:
        self.model, self.deqdiff_ranks = model, ranks
        self.base_model = base_of(model)
        self.gather = RowGather(ranks)

    def __getattr__(self, name: str) -> Any:
        if name in ("model", "deqdiff_ranks", "base_model", "gather"):  # a copy that is being made has none yet
            raise AttributeError(name)
        return getattr(self.model, name)

    def __call__(self, x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """All rows of the prediction for x: (n, *shape), t: (n,); this rank's share of them is computed here."""
        given = (args, kwargs)
        if self.deqdiff_ranks.size == 1:
            args, kwargs = without_marks(given)
            output: Tensor = unwrap_output(self.model(x, t, *args, **kwargs))
            return output
        if torch.is_grad_enabled() and (wanted := self._differentiable(x, given)):
            return call_with_gradient(self, x, t, given, wanted)
        rows, ranks = len(x), self.deqdiff_ranks
        start, stop = share_of(rows, ranks.size, ranks.rank)
        return self.gather(
            kind_of("rows", x.shape[1:], x.dtype), rows, checksum(x, t),
            lambda: self.own_rows(x[start:stop], t[start:stop], own_arguments(given, rows, start, stop)),
            t[start:stop],
        )  # fmt: skip

    def own_rows(self, x: Tensor, t: Tensor, given: tuple[tuple[Any, ...], dict[str, Any]]) -> Tensor | None:
        """The model itself, on this rank's rows; None where there are none. Raises ModelOutputError."""
        if not len(x):
            return None
        value = unwrap_output(self.model(x, t, *given[0], **given[1]))
        if not isinstance(value, Tensor) or value.dim() == 0 or len(value) != len(x):
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ModelOutputError(f"the model returned {got}; expected a tensor of {len(x)} rows, or one in .sample")
        if value.dtype not in DTYPES or value.dim() > MOST_AXES:
            raise ModelOutputError(
                f"the model returned dtype {value.dtype} and {value.dim()} dimensions; expected float16, bfloat16, "
                f"float32 or float64, and at most {MOST_AXES}"
            )
        return value

    def _differentiable(self, x: Tensor, given: Any) -> list[Tensor]:
        """The parameters and arguments that need a gradient."""
        plain = [leaf.value if isinstance(leaf, Shared) else leaf for leaf in tree_leaves(given)]
        given = (x, *plain, *parameters_of(self.model))
        return [value for value in given if isinstance(value, Tensor) and value.requires_grad]
