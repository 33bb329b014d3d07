"""Which timesteps of which samples are being solved: a window that slides from the noise to the sample."""

from __future__ import annotations

import torch

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

    @property
    def count(self) -> int:
        """How many rows are active."""
        return sum(self.hi) - sum(self.lo)

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

    def advance(self, residual: list[list[float]], freeze: float, finish: list[float]) -> list[float]:
        """Slide past what has converged; residual[b][i], Inf from a broken row on. Returns the largest of each sample.

        Row lo[b] was evaluated at a final state, so it is final now whatever its residual. Where it moved by more than
        `freeze`, the rows after it were evaluated at a state that is out of date, and their residuals say nothing: none
        of them is final. Else a row is final when its residual is at most `freeze` and all rows before it are final: an
        error that is frozen early is carried along and may grow, so `freeze` is strict. All rows up to the sample are
        final when none, the first included, is above `finish[b]`: what is left in them shrinks in the last step once
        more. On a device `kernels.advance_window` decides the same.
        """
        worst = [0.0] * len(self.lo)
        for b, (lo, hi) in enumerate(zip(self.lo, self.hi)):
            if lo == self.num_steps:
                continue
            found, front = residual[b], lo
            while front < hi and found[front] <= freeze:
                front += 1
            front, worst[b] = max(front, lo + 1), max(found[lo:hi])
            if hi == self.num_steps and worst[b] <= finish[b]:
                front = self.num_steps
            self.lo[b], self.hi[b] = front, min(self.num_steps, front + self.width)
        return worst
