"""Which elements of the states are here: all of them, or a share, where several processes hold the others."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


class Elements:
    """All elements are here: sums and norms over them are whole.

    Args:
        piece: how many to work on at a time in what takes memory of its own, None for all.
    """

    def __init__(self, piece: int | None = None) -> None:
        self.piece = piece

    def numel(self, own: int) -> int:
        """Elements of a whole state, of which `own` are here."""
        return own

    def sums(self, *own: Tensor) -> tuple[Tensor, ...]:
        """Over all elements, from those over the elements here; one exchange, where there is one."""
        return own

    def norms(self, *own: Tensor) -> tuple[Tensor, ...]:
        """L2, as `sums`."""
        return own

    def pieces(self, own: int) -> list[slice]:
        """What to work on one after the other."""
        size = self.piece or own
        return [slice(first, min(first + size, own)) for first in range(0, own, size)]


ALL_ELEMENTS = Elements()


def joined(parts: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Norms over all pieces, from those over each."""
    found = parts[0]
    for part in parts[1:]:
        found = tuple(total.hypot(norm) for total, norm in zip(found, part, strict=True))
    return found
