"""Steps of the serial chain, made and timed: a few where nothing is known, later as many as take part of a solve.

A machine that is busy with something else disturbs few of many short steps, and every solve. So what solves are held
against is the time of a stretch of steps that is about as long as they are.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from statistics import fmean, median

from torch import Tensor

from ..engine.plain_chain import PlainChain
from ..engine.serial import Report, finish_serially
from ..engine.workspace import Workspace
from .measure import synchronize
from .planner import Planner
from .workload import Workload

TIMED_STEPS = 4  # at least; the first one, which prepares, is not believed
SHARE = 0.5  # of a solve's time, for a stretch
ENOUGH = 0.03  # seconds, beyond which a stretch is long enough: about ten turns of a scheduler


def count_steps(workload: Workload, first: bool) -> int:
    """How many steps are to be timed."""
    stats = workload.stats
    step, solve = stats.costs.step(workload.batch), None if stats.plan is None else stats.plan.chosen.seconds
    if first or not step or solve is None:
        return TIMED_STEPS
    return max(TIMED_STEPS, 1 + math.ceil(min(SHARE * solve, ENOUGH) / step))


def time_plain_steps(
    planner: Planner, workload: Workload, chain: PlainChain, until: int, first: bool
) -> float | None:  # fmt: skip
    """Seconds of a step, made up to state `until`: the median of single ones at first, else the mean of the stretch.

    None where a step went wrong.
    """
    laps = _Laps(planner, workload, first)
    while chain.front < until:
        stop = chain.front + 1 if first or chain.front == 0 else until
        steps = stop - chain.front
        laps.begin()
        if not chain.advance(stop):
            return None
        laps.end(steps)
    return laps.seconds(median)


def time_seen_steps(
    planner: Planner, workload: Workload, work: Workspace, front: list[int], report: Report | None, until: int,
    first: bool,
) -> tuple[float, bool]:  # fmt: skip
    """`time_plain_steps` in the solver's memory, where somebody looks on, whose time is left out.

    Returns the seconds and whether `report` asked to stop.
    """
    laps = _Laps(planner, workload, first)
    laps.begin()

    def timed(made: int, at: list[int], residual: Tensor) -> object:
        laps.end()
        answer = None if report is None else report(made, at, residual)
        laps.begin()
        return answer

    timed.callback = getattr(report, "callback", None)  # type: ignore[attr-defined]
    _, stopped = finish_serially(work, front, 0, timed, until=until)
    return laps.seconds(median if first else fmean), stopped


class _Laps:
    """Times of steps, by the clock in use, and at first by that of the thread as well, to choose between them."""

    def __init__(self, planner: Planner, workload: Workload, first: bool) -> None:
        self.costs, self.device = workload.stats.costs, workload.noise.device
        self.choose = first and planner.clock is None
        self.clocks = [planner.clock_of(workload), *([time.thread_time] if self.choose else [])]
        self.began, self.taken = list[float](), list[list[float]]()

    def begin(self) -> None:
        synchronize(self.device)
        self.began = [clock() for clock in self.clocks]

    def end(self, steps: int = 1) -> None:
        synchronize(self.device)
        self.taken.append([(clock() - began) / steps for clock, began in zip(self.clocks, self.began)])

    def seconds(self, mean: Callable[[list[float]], float]) -> float:
        """Of a step, the first time left out."""
        wall, *thread = map(list, zip(*(self.taken[1:] or self.taken)))
        if self.choose and self.costs.choose_clock(self.device, wall, *thread):
            return mean(*thread)
        return mean(wall)
