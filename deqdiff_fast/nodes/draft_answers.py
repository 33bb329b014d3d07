"""What a draft says at the nodes, on the CPU asked again only where the states have moved since."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Draft = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(r, D) states, their timesteps, (r,), and their samples, (r,) -> predictions."""


class DraftAnswers:
    """Predictions of a draft for all samples at some nodes, (n, B, D). at: (n,) timesteps of the nodes."""

    def __init__(self, draft: Draft, at: Tensor, batch: int) -> None:
        self.draft, self._samples = draft, torch.arange(batch, device=at.device).repeat(len(at))
        self._timesteps = at[:, None].expand(-1, batch).flatten()
        self._states: Tensor | None = None
        self._said: Tensor | None = None  # (n B, D)

    def at(self, states: Tensor, little: float, wanted: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The draft at (n, B, D) states, and at which states that is; little: what a state may have moved, relative to
        its size, and yet count as the same; wanted: (B,) bool, the samples whose answers are to be new, None for all.
        What is returned is not to be written to. A device is asked for all: a few rows take it as long, and to know
        which they are the host would have to wait."""
        rows = states.flatten(0, 1)
        if states.device.type != "cpu":
            return self.draft(rows, self._timesteps, self._samples).view_as(states), states
        if self._states is None or self._said is None:
            self._states, self._said = states.clone(), self.draft(rows, self._timesteps, self._samples)
            return self._said.view_as(states), self._states
        moved = (states - self._states).norm(dim=2) > little * states.norm(dim=2)
        at = (moved if wanted is None else moved & wanted).flatten().nonzero()[:, 0]
        if len(at):
            there = rows.index_select(0, at)
            self._states.flatten(0, 1).index_copy_(0, at, there)
            self._said = self._said.index_copy(0, at, self.draft(there, self._timesteps[at], self._samples[at]))
        return self._said.view_as(states), self._states
