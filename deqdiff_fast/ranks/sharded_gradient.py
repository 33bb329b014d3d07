"""The gradient of a call that is shared out: every rank goes back through its own rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map_only

from .._types import parameters_of
from .faults import attempt, raise_on_all
from .row_gather import checksum, kind_of
from .shares import own_arguments, share_of

if TYPE_CHECKING:
    from .sharded import ShardedModel


@dataclass
class Call:
    """One call and this rank's graph of it.

    wanted: x, tensors among the arguments and parameters, whatever of them needs a gradient. leaves: in the places of
    those, where this rank's graph begins; parameters stand for themselves.
    """

    model: ShardedModel
    x: Tensor
    t: Tensor
    given: Any
    wanted: list[Tensor]
    leaves: list[Tensor] = field(default_factory=list)
    output: Tensor | None = None

    @property
    def share(self) -> tuple[int, int]:
        """[start, stop) of this rank's rows."""
        ranks = self.model.deqdiff_ranks
        return share_of(len(self.x), ranks.size, ranks.rank)

    def forward(self) -> Tensor | None:
        """This rank's rows, with a graph of their own."""
        parameters = {id(p) for p in parameters_of(self.model.model)}
        self.leaves = [v if id(v) in parameters else v.detach().requires_grad_() for v in self.wanted]
        leaf_of = {id(value): leaf for value, leaf in zip(self.wanted, self.leaves)}
        replace: Callable[[Tensor], Tensor] = lambda value: leaf_of.get(id(value), value)  # noqa: E731
        start, stop = self.share
        with torch.enable_grad():
            x, given = replace(self.x), tree_map_only(Tensor, replace, self.given)
            own = own_arguments(given, len(x), start, stop)
            self.output = self.model.own_rows(x[start:stop].clone(), self.t[start:stop], own)
        return None if self.output is None else self.output.detach()

    def backward(self, grad: Tensor) -> list[Tensor]:
        """The products of this rank's rows with `grad`: (n, ...), in the places of `wanted`."""
        start, stop = self.share
        found: list[Tensor | None] = [None] * len(self.leaves)
        if self.output is not None and self.output.requires_grad:
            own = grad[start:stop].to(self.output.dtype)
            found = list(torch.autograd.grad(self.output, self.leaves, own, allow_unused=True))
        return [torch.zeros_like(v) if g is None else g.to(v.dtype) for v, g in zip(self.wanted, found)]


def call_with_gradient(model: ShardedModel, x: Tensor, t: Tensor, given: Any, wanted: list[Tensor]) -> Tensor:
    """All rows, differentiable with respect to `wanted`: x, tensors in `given` and parameters of the model."""
    unique = list({id(value): value for value in wanted}.values())
    output: Tensor = _ShardedCall.apply(Call(model, x, t, given, unique), *unique)  # type: ignore[no-untyped-call]
    return output


class _ShardedCall(Function):
    @staticmethod
    def forward(ctx: Any, call: Call, *wanted: Tensor) -> Tensor:
        ctx.call, x, t = call, call.x, call.t
        start, stop = call.share
        return call.model.gather(
            kind_of("rows", x.shape[1:], x.dtype), len(x), checksum(x, t), call.forward, t[start:stop]
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        call: Call = ctx.call
        model, rows, (start, stop) = call.model, len(call.x), call.share
        ranks, done = model.deqdiff_ranks, attempt(lambda: call.backward(grad))
        seen = checksum(grad)
        table = ranks.exchange([done.status, int(seen)])
        raise_on_all(ranks, [status for status, _ in table], done, call.t[start:stop])
        model.gather.compare([row[1:] for row in table])
        grads: list[Tensor] = done.value
        for value, found in zip(call.wanted, grads):
            if value is call.x:  # rows that are this rank's alone
                kind = kind_of("gradient", value.shape[1:], value.dtype)
                own = found[start:stop] if stop > start else None
                found.copy_(model.gather(kind, rows, seen, lambda own=own: own))  # type: ignore[misc]
            else:
                ranks.add_up(found)
        return (None, *grads)
