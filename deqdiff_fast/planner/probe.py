"""Measurements of batched calls: where they may change a plan, and never for more than they can save."""

from __future__ import annotations

import math

from ..engine.system import System
from ..model.padding import padded_sizes
from .decide import promising
from .measure import measure
from .planner import REFRESH, Planner
from .workload import Workload

REPEATS, WARMUP_SECONDS = 5, 0.25  # a warm-up times each thing so often, or less where that takes so long


def sizes(batch: int, steps: int, limit: int | None, padded: bool = False) -> list[int]:
    """Sizes worth measuring: the batch times powers of two, and the most rows that one call may have.

    padded: of a compiled model, which is called with the padded sizes only.
    """
    top = min(steps * batch, limit or steps * batch)
    if top <= batch:
        return [top]
    if padded:
        return [rows for rows in padded_sizes(top, batch) if rows >= batch]
    return [batch << k for k in range(top.bit_length()) if batch << k < top] + [top]


def may_probe(workload: Workload) -> bool:
    """A quick test, for every solve, whether `measure_sizes` could do anything."""
    return workload.stats.measure_budget > workload.stats.probe_cost


def measure_sizes(planner: Planner, workload: Workload, system: System, warmup: bool = False) -> None:
    """Measure batches as long as a larger one may change the plan.

    warmup: one size after the other, several times each. Else the largest that the measure budget pays for if every row
    costs as much as those of the largest size known, which is more than it will: one slow call of few rows then does
    not speak against many.
    """
    stats, clock, first = workload.stats, planner.clock_of(workload), warmup
    started = clock()
    todo = sizes(workload.batch, system.num_steps, planner.options.row_limit(workload.noise), system.padded)
    while todo:
        known = stats.costs.curve()
        assert known is not None  # a step was timed, and a call with it
        rows, repeats, seconds, within = todo[0], REPEATS, WARMUP_SECONDS, todo
        if not warmup:  # what cannot be paid is not thought about either: that takes its time too
            each, left = known(known.largest) / known.largest, stats.measure_budget - (clock() - started)
            within = [n for n in todo if n * each <= left]
            stats.probe_cost = each * next((n for n in todo if n not in within), math.inf)
        useful = promising(planner.inputs(workload, stats.plan), within) if within else []
        if not (useful or first):
            if warmup or len(within) == len(todo):
                break
            return
        if not warmup:
            rows, repeats, seconds = useful[-1], 1, math.inf  # the first call of a size prepares what others find
        cost = measure(system, workload.noise, rows, repeats=repeats, budget=seconds, clock=clock)
        stats.age = REFRESH
        if cost == math.inf:
            break
        stats.costs.set_call(rows, cost)
        first, todo = False, [n for n in todo if n > rows]
    stats.probe_cost = math.inf
