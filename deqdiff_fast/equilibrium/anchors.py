"""States on the way of a reversible iteration, a fixed number of them however long it is."""

from __future__ import annotations

from torch import Tensor

CAPACITY = 8  # pairs of states

Pair = tuple[Tensor, Tensor]


class Anchors:
    """Pairs (y, z) after some rounds, at most CAPACITY of them beside the first one.

    Args:
        start: the pair before the first round.
        segment: only pairs after a multiple of so many rounds are kept.
    """

    def __init__(self, start: Pair, segment: int) -> None:
        self.segment = segment
        self.kept = {0: start}
        self._stride = segment

    def offer(self, round: int, pair: Pair) -> None:
        """Keep the pair after `round` rounds if there is room; every second one makes room for later ones."""
        if round == 0 or round % self._stride:
            return
        self.kept[round] = pair
        if len(self.kept) > CAPACITY + 1:
            self._stride *= 2
            self.kept = {r: p for r, p in self.kept.items() if r % self._stride == 0}

    def nearest(self, round: int) -> tuple[int, Pair]:
        """The last one that is kept up to `round`."""
        found = max(r for r in self.kept if r <= round)
        return found, self.kept[found]

    def make_room(self, round: int) -> None:
        """Forget those beyond `round`, which a way back has passed, and space the next ones offered up to it evenly."""
        self.kept = {r: p for r, p in self.kept.items() if r <= round}
        missing = (round - self.nearest(round)[0]) // self.segment
        room = max(1, CAPACITY + 1 - len(self.kept))
        self._stride = self.segment * max(1, -(-missing // room))
