"""Steps of the serial chain, made and timed: a few where nothing is known, later as many as take part of a solve.

A machine that is busy with something else disturbs few of many short steps, and every solve. So what solves are held
against is the time of a stretch of steps that is about as long as they are.
"""

from __future__ import annotations

import math
from statistics import median

from torch import Tensor

from ..engine.plain_chain import PlainChain
from ..engine.serial import Report, finish_serially
from ..engine.workspace import Workspace
from .measure import synchronize
from .planner import Planner, Workload

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


def time_plain_steps(planner: Planner, chain: PlainChain, until: int, first: bool) -> float | None:
    """Seconds of a step, made up to state `until`: the median of single ones at first, else the mean of the stretch.

    None where a step went wrong.
    """
    taken = []
    while chain.front < until:
        stop = chain.front + 1 if first or chain.front == 0 else until
        synchronize(chain.system.device)
        began, steps = planner.clock(), stop - chain.front
        if not chain.advance(stop):
            return None
        synchronize(chain.system.device)
        taken.append((planner.clock() - began) / steps)
    return median(taken[1:] or taken)


def time_seen_steps(
    planner: Planner, work: Workspace, front: list[int], report: Report | None, until: int, first: bool
) -> tuple[float, bool]:
    """`time_plain_steps` in the solver's memory, where somebody looks on, whose time is left out.

    Returns the seconds and whether `report` asked to stop.
    """
    began, taken = [planner.clock()], []

    def timed(made: int, at: list[int], residual: Tensor) -> object:
        synchronize(work.system.device)
        taken.append(planner.clock() - began[0])
        answer = None if report is None else report(made, at, residual)
        began[0] = planner.clock()
        return answer

    timed.callback = getattr(report, "callback", None)  # type: ignore[attr-defined]
    _, stopped = finish_serially(work, front, 0, timed, until=until)
    taken = taken[1:] or taken
    return median(taken) if first else sum(taken) / len(taken), stopped
