"""Which rows of a call belong to which rank, and how many bytes that moves."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map

from .._types import Shared
from ..model.sample_kwargs import is_list_of_strings, is_per_sample

HEADER = 40  # bytes before a rank's rows: five numbers of eight


def share_of(rows: int, size: int, rank: int) -> tuple[int, int]:
    """[start, stop) of one rank's rows, of `size` ranks; shares differ by at most one row, the first are the larger."""
    whole, more = divmod(rows, size)
    start = rank * whole + min(rank, more)
    return start, start + whole + (rank < more)


def message_bytes(rows: int, size: int, row_bytes: int) -> int:
    """What a rank hands to each of the others in a call on that many rows: HEADER and the largest share, rounded up to
    eight bytes. A call so sends (size - 1) times that from every rank."""
    largest = -(-rows // size) * row_bytes
    return HEADER + -(-largest // 8) * 8


def own_arguments(arguments: Any, rows: int, start: int, stop: int) -> Any:
    """The arguments of a call on `rows` rows, for rows [start, stop): what has one row for each is cut, what `shared`
    has marked, and everything else, is passed on."""

    def part(value: Any) -> Any:
        if isinstance(value, Shared):
            return value.value
        if isinstance(value, Tensor) or is_list_of_strings(value):
            return value[start:stop] if is_per_sample(value, rows) else value
        return value

    return tree_map(part, arguments, is_leaf=lambda value: isinstance(value, Shared) or is_list_of_strings(value))
