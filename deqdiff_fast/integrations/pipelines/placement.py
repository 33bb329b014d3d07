"""Where the state lies in an input of a model: all of it, a few times over, or a part of it beside what stays."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Placement:
    """The B samples of a state in an input of copies * B rows, one copy after the other."""

    copies: int
    dtype: torch.dtype
    rest: Tensor | None = None
    """The input as it was recorded, where not all of it is state."""
    block: tuple[int, int] | None = None
    """The dimension along which the state is a part of the input, and where it begins."""
    mask: Tensor | None = None
    """Where the input is the state, if that is no block."""
    tokens: bool = False
    """Whether it is the state's places one after the other, with channels last."""

    def fill(self, state: Tensor, rows: Tensor) -> Tensor:
        """The input for state: (n, *shape); rows: (copies * n,), which of the recorded rows its own belong to."""
        own = _as_tokens(state) if self.tokens else state
        whole = torch.cat([own.to(self.dtype)] * self.copies)
        if self.rest is None:
            return whole
        rest = self.rest.index_select(0, rows)
        if self.mask is not None:
            return torch.where(self.mask.index_select(0, rows), whole, rest)
        assert self.block is not None
        dim, start = self.block
        rest.narrow(dim, start, whole.shape[dim]).copy_(whole)
        return rest

    def holds(self, whole: Tensor, state: Tensor) -> bool:
        """Whether `whole` is what `fill` makes of the B samples of a state."""
        if len(whole) != self.copies * len(state) or (self.rest is not None and len(whole) != len(self.rest)):
            return False
        expected = self.fill(state, torch.arange(len(whole), device=whole.device))
        return expected.shape == whole.shape and torch.equal(expected, whole)

    def parts(self, output: Tensor, shape: torch.Size) -> list[Tensor]:
        """The halves of a model's output as the state lies in its input, each (n, *shape): without a predicted
        variance, or what follows the state's tokens."""
        if self.tokens and output.dim() == 3:
            start = self.block[1] if self.block is not None else 0
            places = math.prod(shape[1:])
            output = output.narrow(1, start, places).mT.reshape(len(output), -1, *shape[1:])
        for dim, size in enumerate(shape, 1):
            if output.dim() == len(shape) + 1 and output.shape[dim] > size:
                output = output.narrow(dim, 0, size)
        return list(output.chunk(self.copies))


def _as_tokens(state: Tensor) -> Tensor:
    """(n, C, ...) as (n, places, C)."""
    return state.flatten(2).mT


def locate(whole: Tensor, state: Tensor) -> Placement | None:
    """Where `state` lies in `whole`; None where it does not, or in several places."""
    if not len(state) or len(whole) % len(state) or not whole.is_floating_point():
        return None
    if whole.dim() == 3 and state.dim() > 3:
        found = locate(whole, _as_tokens(state))
        return None if found is None or found.mask is not None else replace(found, tokens=True)
    if whole.dim() != state.dim():
        return None
    copies, tiled = len(whole) // len(state), torch.cat([state.to(whole.dtype)] * (len(whole) // len(state)))
    apart = [d for d in range(1, whole.dim()) if whole.shape[d] != tiled.shape[d]]
    if not apart:
        same = whole == tiled
        if bool(same.all()):
            return Placement(copies, whole.dtype)
        varied = bool((tiled != tiled.flatten()[0]).any())
        return Placement(copies, whole.dtype, whole.clone(), mask=same) if varied and bool(same.any()) else None
    if len(apart) > 1 or whole.shape[apart[0]] < tiled.shape[apart[0]]:
        return None
    dim, size = apart[0], tiled.shape[apart[0]]
    starts = [k for k in range(whole.shape[dim] - size + 1) if torch.equal(whole.narrow(dim, k, size), tiled)]
    return Placement(copies, whole.dtype, whole.clone(), block=(dim, starts[0])) if len(starts) == 1 else None
