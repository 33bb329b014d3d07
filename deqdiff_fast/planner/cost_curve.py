"""What a model call costs, by its rows."""

from __future__ import annotations

import math
from bisect import bisect_left

# Costs are noisy: what differs from what is simpler or in use must promise to take at most this part of its time.
MARGIN = 0.95


class Curve:
    """Seconds of one model call over its rows, linear between measured sizes.

    It never falls: where a call of more rows takes less time, as of two rows that go through another kernel than one,
    fewer rows are padded to as many, see `padding`. Beyond the largest size a row costs what the last ones did, and at
    least a quarter of their mean.
    """

    def __init__(self, points: dict[int, float]) -> None:
        if not points or any(n < 1 or not (0 <= s < math.inf) for n, s in points.items()):
            raise ValueError(f"points: expected {{rows >= 1: seconds >= 0}}, at least one, got {points}")
        self.points, self.sizes = points, sorted(points)
        self.seconds: list[float] = [min(points[m] for m in self.sizes if m >= n) for n in self.sizes]

    def padding(self) -> tuple[tuple[int, int], ...]:
        """(least, size): calls of `least` rows or more, but fewer than `size`, are made with `size` rows."""
        found, sizes, points = list[tuple[int, int]](), self.sizes, self.points
        for size in reversed(sizes):
            least = size
            for n in reversed(sizes[: sizes.index(size)]):
                if points[size] >= MARGIN * points[n]:
                    break
                least = n
            if least < size and not any(low <= least for low, _ in found):
                found.append((least, size))
        return tuple(reversed(found))

    @property
    def largest(self) -> int:
        """The largest measured size, in rows."""
        return self.sizes[-1]

    @property
    def slope(self) -> float:
        """Seconds of one more row, from the last two sizes."""
        (*_, n), (*_, last) = self.sizes, self.seconds
        return last / n if len(self.sizes) == 1 else (last - self.seconds[-2]) / (n - self.sizes[-2])

    def __call__(self, rows: float) -> float:
        sizes, seconds = self.sizes, self.seconds
        if rows <= sizes[0]:
            return seconds[0]
        if rows > sizes[-1]:
            return seconds[-1] + (rows - sizes[-1]) * max(self.slope, seconds[-1] / sizes[-1] / 4)
        k = bisect_left(sizes, rows)
        part = (rows - sizes[k - 1]) / (sizes[k] - sizes[k - 1])
        return seconds[k - 1] + part * (seconds[k] - seconds[k - 1])

    def in_pieces(self, rows: float, piece: int) -> float:
        """Seconds of calls of `piece` rows each that together have that many."""
        whole = int(rows // piece)
        rest = rows - whole * piece
        return whole * self(piece) + (self(rest) if rest > 0 else 0.0)

    def of_step(self, batch: int, limit: int | None) -> float:
        """Seconds of the model in a step of the serial chain, which pads nothing."""
        return self.points.get(batch, 0.0) or self.in_pieces(batch, self.best_piece(batch, limit))

    def best_piece(self, rows: int, limit: int | None) -> int:
        """The rows in one call with which that many rows take the shortest, at most `limit`."""
        best = top = min(rows, limit or rows)
        for piece in self.sizes:
            if piece < top and self.in_pieces(rows, piece) < MARGIN * self.in_pieces(rows, best):
                best = piece
        return best
