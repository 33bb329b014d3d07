"""Which timesteps of which samples are being solved: a window that slides from the noise to the sample."""

from __future__ import annotations

import torch
from torch import Tensor

from .._types import Rows


class Window:
    """Rows lo[b] <= i < hi[b] <= lo[b] + width are active. Everything before lo[b] is final, for each sample b."""

    def __init__(self, num_steps: int, batch: int, width: int, start: int = 0) -> None:
        """start: how many rows are final from the beginning."""
        self.num_steps, self.width = num_steps, width
        self.lo = [start] * batch
        self.hi = [min(start + width, num_steps)] * batch

    @property
    def done(self) -> bool:
        return min(self.lo) >= self.num_steps

    def rows(self) -> Rows:
        """The active rows."""
        live = [(a, b) for a, b in zip(self.lo, self.hi) if a < b]
        if len(live) == len(self.lo) and len(set(live)) == 1:
            (lo, hi), batch = live[0], len(self.lo)
            return Rows(None, lo, hi, (hi - lo) * batch)
        step = torch.arange(min(a for a, _ in live), max(b for _, b in live))[:, None]
        active = (step >= torch.tensor(self.lo)) & (step < torch.tensor(self.hi))
        picked = active.nonzero()
        flat = (picked[:, 0] + int(step[0])) * len(self.lo) + picked[:, 1]
        return Rows(flat, int(step[0]), int(step[-1]) + 1, len(flat))

    def advance(
        self, residual: Tensor, freeze: float, finish: float
    ) -> tuple[list[int], list[int], list[int], list[int]]:
        """Slide past what has converged; residual: (T, B) on the CPU. Returns the old and new lo, the old and new hi.

        Row lo[b] was evaluated at a final state, so it is final now whatever its residual. After it, a row is final
        when its residual is at most `freeze` and all rows before it are final: an error that is frozen early is carried
        along and may grow, so `freeze` is strict. All rows up to the sample are final when none is above `finish`: what
        is left in them shrinks in the last step once more.
        """
        old_lo, old_hi = list(self.lo), list(self.hi)
        small, fine = (residual <= freeze).tolist(), residual <= finish
        for b in range(len(self.lo)):
            if self.lo[b] == self.num_steps:
                continue
            front = self.lo[b] + 1
            while front < self.hi[b] and small[front][b]:
                front += 1
            if self.hi[b] == self.num_steps and bool(fine[front:, b].all()):
                front = self.num_steps
            self.lo[b], self.hi[b] = front, min(self.num_steps, front + self.width)
        return old_lo, list(self.lo), old_hi, list(self.hi)

    def worst(self, residual: Tensor, lo: list[int], hi: list[int]) -> Tensor:
        """(B,) the largest residual of rows [lo[b], hi[b]); 0 where there are none."""
        return torch.stack(
            [residual[a:b, k].max() if a < b else residual.new_zeros(()) for k, (a, b) in enumerate(zip(lo, hi))]
        )
