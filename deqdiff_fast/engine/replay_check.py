"""Whether a replay does what the work did that it was recorded of: both done on the same memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

AGREES = 5e-3  # relative L2: a replay that differs by more from the work it recorded did not record all of it
CHUNK = 1 << 22  # elements compared at a time
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class ReplayCheck:
    """Memory as a piece of work finds it, twice: once for the work, once for a replay.

    Args:
        tensors: all that the work writes to. Not read meanwhile by anybody else.
        rewritten: the work does not read them, so that they are filled with NaN before either: what a replay leaves
            alone cannot be right already. Else both find what was there.

    Raises:
        torch.OutOfMemoryError: there is no room for two copies.
    """

    def __init__(self, tensors: Sequence[Tensor], rewritten: bool) -> None:
        self.tensors, self.rewritten = tensors, rewritten
        self.before = [tensor.clone() for tensor in tensors]
        self.expected = [torch.empty_like(tensor) for tensor in self.before]
        self._set_out()

    def _set_out(self) -> None:
        for tensor, before in zip(self.tensors, self.before):
            bits(tensor).fill_(-1) if self.rewritten else tensor.copy_(before)

    def work_done(self) -> None:
        """What is there now is what a replay has to reproduce."""
        for tensor, expected in zip(self.tensors, self.expected):
            expected.copy_(tensor)
        self._set_out()

    def agrees(self) -> bool | None:
        """Whether a replay, done now, has; None where the work has changed nothing, which shows nothing."""
        changed = 0
        for tensors in zip(self.tensors, self.expected, self.before):
            chunks = zip(*(torch.split(tensor.reshape(-1), CHUNK) for tensor in tensors))
            apart, moved, count = (sum(parts) for parts in zip((0.0, 0.0, 0), *(self._compare(*c) for c in chunks)))
            if not apart <= AGREES**2 * moved:  # NaN: something is NaN in one of them only
                return False
            changed += count
        return True if changed else None

    def _compare(self, now: Tensor, expected: Tensor, before: Tensor) -> tuple[float, float, int]:
        """(squared difference, squared change by the work, how many elements it has changed). Memory that nobody has
        written may hold anything."""
        same, untouched = bits(now) == bits(expected), bits(expected) == (-1 if self.rewritten else bits(before))
        count = int((~untouched).sum())
        if not now.is_floating_point():
            return 0.0 if bool(same.all()) else float("inf"), 0.0, count
        apart = (now.double() - expected.double()).masked_fill_(same | (now.isnan() & expected.isnan()), 0)
        moved = expected.double() if self.rewritten else expected.double() - before.double()
        moved = moved.masked_fill_(untouched, 0).nan_to_num_(1.0, 1.0, 1.0)
        return float(apart.square_().sum()), float(moved.square_().sum()), count

    def finish(self, found: bool) -> None:
        """Leave what the work has left: what is there now, or what was found then (`found`)."""
        for tensor, expected, before in zip(self.tensors, self.expected, self.before):
            if found:
                tensor.copy_(expected)
            if self.rewritten:
                tensor.copy_(torch.where(bits(tensor) == -1, before, tensor))

    def undo(self) -> None:
        """Leave what was there at first."""
        for tensor, before in zip(self.tensors, self.before):
            tensor.copy_(before)


def bits(tensor: Tensor) -> Tensor:
    """The tensor as integers; all ones are a NaN that no operation makes."""
    return tensor.view(_BITS[tensor.element_size()]) if tensor.is_floating_point() else tensor
