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
        """Whether every row of every sample is final."""
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
