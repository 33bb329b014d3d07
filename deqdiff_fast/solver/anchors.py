"""The timesteps at which a draft is asked, and what is taken from them in between.

What a draft predicts beyond the diagonal slope is smooth along the chain in units of the predicted clean sample (R_i
q_i, as in `coarse_grids`). A chain goes forward, so between two such timesteps, the anchors, it is extrapolated from
the last two. In the last twentieth of the chain q goes to zero, and what is extrapolated is divided by it: there every
timestep is an anchor.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

END = 20  # part of the chain in which every timestep is an anchor


class Segment(NamedTuple):
    """Rows start <= i < stop: anchor number `number`, and the rows that follow it."""

    number: int
    start: int
    stop: int


class Anchors:
    """Every `stride`-th of T timesteps, and each of the last ones."""

    def __init__(self, steps: int, stride: int) -> None:
        self.steps, self.stride = steps, stride
        self.tail = max(steps - max(stride, -(-steps // END)), 0)
        self.body = -(-self.tail // stride)
        self.count = self.body + steps - self.tail

    def rows(self, device: torch.device) -> Tensor:
        """(count,) int64, made on the device."""
        number = torch.arange(self.count, device=device)
        return torch.where(number < self.body, number * self.stride, number - self.body + self.tail)

    def known(self) -> list[int]:
        """The same, to the host."""
        return [*range(0, self.tail, self.stride), *range(self.tail, self.steps)]

    def segments(self, first: int, last: int) -> list[Segment]:
        """Those that have rows first <= i < last."""
        starts = self.known()
        stops = [*starts[1:], self.steps]
        return [Segment(n, a, b) for n, (a, b) in enumerate(zip(starts, stops)) if b > first and a < last]

    def weights(self, q: Tensor) -> Tensor:
        """(T, 2): what every row takes from the remainders of the anchor before its own, and of its own.

        q: (T,) of x0 = p x + q E; made on its device.
        """
        step = torch.arange(self.steps, device=q.device)
        inside = step < self.tail
        own = torch.where(inside, step // self.stride, self.body + step - self.tail)
        before = torch.where(inside & (own > 0), own - 1, own)
        rows = self.rows(q.device)
        further = torch.where(before < own, (step - rows[own]) / self.stride, 0).to(q.dtype)
        safe = torch.where(q == 0, 1, q)
        return torch.stack([-further * safe[rows[before]] / safe, (1 + further) * safe[rows[own]] / safe], 1)
