"""One clock for all ranks, so that whatever they decide by the time is decided alike."""

from __future__ import annotations

import time

from ..ranks.group import Ranks
from ..schedule import Schedule
from ..schedule.cache import seconds_of_tables


class SharedClock:
    """Seconds on rank 0, the same number on all ranks; every look at it is an exchange.

    Time in which rank 0 computes tables of the schedule, which later solves find, does not count.
    """

    def __init__(self, ranks: Ranks, schedule: Schedule | None = None) -> None:
        self.ranks, self.schedule = ranks, schedule

    def _own(self) -> float:
        return time.perf_counter() - (0.0 if self.schedule is None else seconds_of_tables(self.schedule))

    def __call__(self) -> float:
        """Now."""
        self.ranks.now = self._own  # from here on rows are sent with the time by this clock
        return self.ranks.first(self._own())

    def last(self) -> float:
        """When rank 0 sent its rows of the last model call since the clock was asked: nothing is exchanged for that,
        but along other dimensions of a mesh."""
        return self.ranks.first_of_others(self.ranks.stamp)
