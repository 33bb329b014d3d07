"""Where the state lies in an input of a model: all of it, a few times over, or a part of it beside what stays."""

from __future__ import annotations

from dataclasses import dataclass

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

    def fill(self, state: Tensor, rows: Tensor) -> Tensor:
        """The input for state: (n, *shape); rows: (copies * n,), which of the recorded rows its own belong to."""
        whole = torch.cat([state.to(self.dtype)] * self.copies)
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
        if whole.dim() != state.dim() or len(whole) != self.copies * len(state):
            return False
        expected = self.fill(state, torch.arange(len(whole), device=whole.device))
        return expected.shape == whole.shape and torch.equal(expected, whole)


def locate(whole: Tensor, state: Tensor) -> Placement | None:
    """Where `state` lies in `whole`; None where it does not, or in several places."""
    if whole.dim() != state.dim() or not len(state) or len(whole) % len(state) or not whole.is_floating_point():
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
