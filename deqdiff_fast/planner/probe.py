"""Measurements of batched calls: a few, where they may change a plan, and never for more than they can save."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from ..engine.system import System
from ..model.padding import padded_sizes
from ..plan import Candidate
from . import measure as cost
from .decide import promising
from .planner import Planner, WorkloadStats

TRIES = 2  # solves that a warm-up makes of different windows
NEAR = 1.5  # how much slower than the serial chain a prediction may be for a warm-up to try it
REPEATS, BUDGET = 5, 0.3  # calls that a warm-up times of each size, and the seconds after which it takes fewer


def sizes(batch: int, steps: int, limit: int | None, padded: bool = False) -> list[int]:
    """Sizes worth measuring: the batch times powers of two, and the most rows that one call may have.

    padded: of a compiled model, which is called with the padded sizes only.
    """
    top = min(steps * batch, limit or steps * batch)
    if top <= batch:
        return [top]
    if padded:
        return [rows for rows in padded_sizes(top, batch) if rows >= batch]
    found = [batch]
    while found[-1] * 2 <= top:
        found.append(found[-1] * 2)
    return found if found[-1] >= top else [*found, top]


def may_probe(site: WorkloadStats) -> bool:
    """A quick look, for every solve, at whether `probe` could do anything."""
    return not site.exhausted and site.allowance > site.price


def probe(
    planner: Planner,
    site: WorkloadStats,
    noise: Tensor,
    model_kwargs: dict[str, Any] | None,
    system: System | None = None,
) -> System | None:
    """Measure one more batch size where it may matter and the allowance pays for it. Returns what was called.

    The largest size that is allowed if every row costs as much as those of the largest size known, which is more than
    it will.
    """
    curve, options, started = site.costs.curve(), planner.options, planner.clock()
    if curve is None:
        return None
    situation = planner.situation(site, noise, model_kwargs, site.plan)
    larger = [
        n for n in sizes(site.batch, options.schedule.num_steps, situation.limit, planner.padded) if n > curve.largest
    ]
    useful = promising(situation, larger)
    if not useful:
        site.exhausted = True
        return None
    each = curve(curve.largest) / curve.largest
    affordable = [n for n in useful if n * each <= site.allowance]
    if not affordable:
        site.price = useful[0] * each
        return None
    rows, system = affordable[-1], system or options.system(noise, model_kwargs)
    seconds = cost.time_call(system, noise, rows, planner.clock)
    if 2 * seconds <= site.allowance - (planner.clock() - started):  # the first call of a size prepares as well
        seconds = min(seconds, cost.time_call(system, noise, rows, planner.clock))
    site.costs.learn_call(rows, seconds)
    site.price = 0.0
    planner.forget_plan(site)
    return system


def measure_all(
    planner: Planner, site: WorkloadStats, system: System, noise: Tensor, model_kwargs: dict[str, Any] | None
) -> None:
    """Measure all sizes from the smallest on, until no larger one can change the plan."""
    limit = planner.options.row_limit(noise)
    grid_sizes = sizes(site.batch, system.num_steps, limit, planner.padded)
    for k, rows in enumerate(grid_sizes):
        if k > 0 and not promising(planner.situation(site, noise, model_kwargs), grid_sizes[k:]):
            break
        seconds = cost.measure(system, noise, rows, repeats=REPEATS, budget=BUDGET, clock=planner.clock)
        if seconds == math.inf:
            break
        site.costs.set_call(rows, seconds)
    site.exhausted = True
    planner.forget_plan(site)


def worth_trying(
    planner: Planner, site: WorkloadStats, noise: Tensor, model_kwargs: dict[str, Any] | None
) -> list[Candidate]:
    """The solves that are predicted to be the fastest and not much slower than the serial chain."""
    plan = planner.plan(site, noise, model_kwargs)
    bar = NEAR * (plan.serial_seconds or 0.0)
    near = [c for c in plan.candidates[1:] if c.seconds is not None and c.seconds <= bar]
    return sorted(near, key=lambda c: c.seconds or 0.0)[:TRIES]
