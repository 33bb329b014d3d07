"""The beginning of a solve on several ranks: whether all were asked the same, and who is looking on."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ..errors import RankError
from ..solution import asks_to_stop
from .digests import digest
from .faults import attempt, raise_on_all
from .group import Ranks

_MOST_BYTES = 2**62


def begin_together(
    ranks: Ranks, check: Callable[[], None], facts: Callable[[], dict[str, Any]], names: tuple[str, ...],
    callback: Callable[..., object] | None, progress: bool, usable: float = math.inf,
) -> Callable[..., object] | None:  # fmt: skip
    """Make sure that all ranks ask for the same.

    Args:
        check: raises what is wrong with the arguments of this rank.
        facts: what must be the same on all ranks, by `names`; called once the arguments are known to be sound.
        callback, progress: what this rank wants to see.
        names: in which order.
        usable: memory for a solve on this rank, in bytes.

    Returns:
        The callback to solve with, by which one rank's stops all; None where no rank is looking.

    Raises:
        what `check` does; RankError where it does so on another rank, or where the ranks differ.
    """
    if ranks.size == 1 or ranks.solving > 1:  # a solve that is part of another one
        check()
        return callback

    def work() -> list[int]:
        check()
        known = facts()
        return [digest(known[name]) for name in names]

    done = attempt(work)
    looking, room = int(callback is not None or progress), int(min(usable, _MOST_BYTES))
    table = ranks.exchange([done.status, looking, room, *(done.value or [0] * len(names))])
    _raise_own(ranks, [row[0] for row in table], done)
    for rank, row in enumerate(table):
        other = [name for name, mine, first in zip(names, row[3:], table[0][3:]) if mine != first]
        if other:
            message = f"rank {rank} was called with other {' and other '.join(other)} than rank 0; all ranks must be "
            raise ranks.agreed(RankError(f"{message}called with the same", rank=rank))
    looking, least = max(row[1] for row in table), min(row[2] for row in table)
    for along in ranks.others:
        rows = along.exchange([looking, least])
        looking, least = max(row[0] for row in rows), min(row[1] for row in rows)
    ranks.usable = math.inf if least >= _MOST_BYTES else float(least)
    return AgreedCallback(ranks, callback) if looking else None


def _raise_own(ranks: Ranks, statuses: list[int], done: Any) -> None:
    """A rank whose own arguments are wrong raises what it would raise alone, the others that."""
    try:
        raise_on_all(ranks, statuses, done)
    except RankError:
        if done.error is not None:
            raise ranks.agreed(done.error) from None
        raise


class AgreedCallback:
    """A callback that stops all ranks where it stops one. What it raises is raised there, and a RankError elsewhere."""

    def __init__(self, ranks: Ranks, callback: Callable[..., object] | None) -> None:
        self.ranks, self.callback = ranks, callback

    def __call__(self, info: Any) -> bool:
        callback = self.callback
        done = attempt(lambda: callback is not None and asks_to_stop(callback(info)))
        table = self.ranks.exchange([done.status, int(bool(done.value))])
        _raise_own(self.ranks, [status for status, _ in table], done)
        stops = max(stops for _, stops in table)
        for other in self.ranks.others:
            stops = max(row[0] for row in other.exchange([stops]))
        return bool(stops)
