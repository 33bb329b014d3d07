"""What a draft says at the nodes, on the CPU asked again only where the states have moved since."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Draft = Callable[[Tensor, tuple[int, ...]], Tensor]
"""(n, B, D) states of those timesteps -> predictions."""


class DraftAnswers:
    """Predictions of a draft at some nodes: (n, B, D)."""

    def __init__(self, draft: Draft, nodes: tuple[int, ...]) -> None:
        self.draft, self.nodes = draft, nodes
        self._states: Tensor | None = None
        self._said: Tensor | None = None

    def at(self, states: Tensor, little: float) -> Tensor:
        """The draft at (n, B, D) states; little: what a state may have moved, relative to its size, and yet count as
        the same. What is returned is not to be written to. A device is asked for all: a few rows take it as long, and
        to know which they are the host would have to wait."""
        if states.device.type != "cpu":
            return self.draft(states, self.nodes)
        if self._states is None or self._said is None:
            self._states, self._said = states.clone(), self.draft(states, self.nodes)
            return self._said
        moved = (states - self._states).norm(dim=2) > little * states.norm(dim=2)
        at = moved.any(1).nonzero()[:, 0]
        if len(at):
            nodes = tuple(self.nodes[k] for k in at.tolist())
            there = states.index_select(0, at)
            self._states.index_copy_(0, at, there)
            self._said = self._said.index_copy(0, at, self.draft(there, nodes))
        return self._said
