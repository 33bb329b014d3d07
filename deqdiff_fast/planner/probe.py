"""Measurements of batched calls: where they may change a plan, and never for more than they can save."""

from __future__ import annotations

import math

from ..engine.system import System
from ..model.padding import padded_sizes
from .decide import promising
from .measure import measure
from .planner import Planner, Workload

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


def may_probe(load: Workload) -> bool:
    """A quick look, for every solve, at whether `measure_sizes` could do anything."""
    return not load.stats.exhausted and load.stats.measure_budget > load.stats.probe_cost


def measure_sizes(planner: Planner, load: Workload, system: System, warmup: bool = False) -> None:
    """Measure batches, each twice as large as the one before, as long as a larger one may change the plan.

    warmup: from the smallest on, several times each; else those larger than what is known, while the measure budget
    pays for them if every row costs as much as those of the largest size known, which is more than it will.
    """
    stats, started = load.stats, planner.clock()
    todo = sizes(load.batch, system.num_steps, planner.options.row_limit(load.noise), planner.padded)
    while todo:
        curve = stats.costs.curve()
        assert curve is not None  # a step was timed, and a call with it
        if not warmup:
            todo = [rows for rows in todo if rows > curve.largest]
        if not (warmup and todo[0] == load.batch) and not promising(planner.inputs(load, stats.plan), todo):
            break
        rows = todo.pop(0)
        repeats, seconds = REPEATS, WARMUP_SECONDS
        if not warmup:
            bound = rows * curve(curve.largest) / curve.largest
            left = stats.measure_budget - (planner.clock() - started)
            if bound > left:
                stats.probe_cost = bound
                return
            repeats, seconds = 1, left / 2  # the first call of a size prepares as well
        cost = measure(system, load.noise, rows, repeats=repeats, budget=seconds, clock=planner.clock)
        planner.forget_plan(stats)
        if cost == math.inf:
            break
        stats.costs.set_call(rows, cost)
        stats.probe_cost = 0.0
    stats.exhausted = True
