"""Measurements ahead of the first sample."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from .._types import parameters_of
from ..engine.arguments import check_shape, count
from ..engine.options import Options
from ..engine.solve import Request, plain_chain
from ..engine.system import System
from ..engine.workspace import Workspace
from ..model.padding import padded_sizes
from ..plan import Plan
from ..solver.picard import Picard
from .decide import decide
from .measure import time_call
from .planner import MOST_PREPARING, REFRESH, Planner
from .probe import REPEATS, WARMUP_SECONDS, measure_sizes
from .run import solve_in_rounds
from .timed_steps import ENOUGH, TIMED_STEPS, time_plain_steps, time_seen_steps
from .workload import Workload

NEAR = 1.5  # solves are tried that are predicted to take at most this many times what the best way does


def example_noise(
    options: Options, shape: tuple[int, ...], batch: int, dtype: torch.dtype | None, device: torch.device | str | None
) -> Tensor:
    """Noise of the kind that a request would have; dtype and device are those of the model unless given."""
    check_shape(shape)
    first = next(iter(parameters_of(options.model)), torch.empty(0))
    size = (count("batch", batch) or 1, *shape)
    noise = torch.randn(size, generator=torch.Generator().manual_seed(0)) * options.schedule.init_noise_sigma
    return noise.to(first.device if device is None else torch.device(device), first.dtype if dtype is None else dtype)


def compile_sizes(options: Options, system: System, noise: Tensor) -> None:
    """Call a compiled model once with every size that a solve may call it with; nothing for a plain one."""
    if system.padded:
        for rows in padded_sizes(options.most_rows(noise), system.batch):
            time_call(system, noise, rows)


def warm_up(planner: Planner, noise: Tensor, model_kwargs: dict[str, Any] | None) -> Plan:
    """Measure calls and steps, then make the solves that look good, once to prepare and some times to learn from."""
    options, workload = planner.options, planner.workload(noise, model_kwargs)
    draw: Callable[[], torch.Generator] = lambda: torch.Generator(noise.device).manual_seed(0)  # noqa: E731
    with torch.no_grad():
        system = options.system(noise, model_kwargs)
        compile_sizes(options, system, noise)
        step = _step_seconds(planner, workload, system, draw())
        planner.record_first_steps(workload, system, step, few=False)
        measure_sizes(planner, workload, system, warmup=True)
        solves = [c for c in planner.plan(workload).candidates if c.window > 1 and c.seconds is not None]
        for solve in sorted(solves, key=lambda c: c.seconds or 0.0):
            best = decide(planner.inputs(workload)).chosen.seconds or 0.0  # by what those before have shown
            if (solve.seconds or 0.0) <= NEAR * best:
                _try(planner, workload, Request(noise, draw()), solve.window)
        workload.stats.measure_budget = 0.0
        workload.stats.age = REFRESH
        return planner.plan(workload)


def _step_seconds(
    planner: Planner, workload: Workload, system: System, generator: torch.Generator
) -> float:  # fmt: skip
    """Seconds of a step of the serial chain: of whole ones where these are quick, else of a stretch."""
    steps, request = system.num_steps, Request(workload.noise, generator)
    few, chains = _stretch(planner, workload, system, request, 2 * TIMED_STEPS + 1, first=True), list[float]()
    while len(chains) < REPEATS and (sum(chains) + max(few, *chains, 0.0)) * steps < WARMUP_SECONDS:
        chains.append(_stretch(planner, workload, system, request, steps, first=False))
    if chains or few * 2 * TIMED_STEPS >= ENOUGH:
        return median(chains or [few])
    return _stretch(planner, workload, system, request, 1 + math.ceil(ENOUGH / few), first=False)


def _stretch(
    planner: Planner, workload: Workload, system: System, request: Request, steps: int, first: bool
) -> float:  # fmt: skip
    """Seconds of a step of that many at the beginning of a chain, made as the serial chain is."""
    until, options = min(steps, system.num_steps), planner.options
    chain = plain_chain(system, request)
    step = None if chain is None else time_plain_steps(planner, workload, chain, until, first)
    if step is not None:
        return step
    work = Workspace.open(system, Picard(), 1, options.memory, options.backend)
    with work.lease:
        work.begin(request.noise, request.generator)
        return time_seen_steps(planner, workload, work, [0] * system.batch, None, until, first)[0]


def _try(planner: Planner, workload: Workload, request: Request, window: int) -> None:
    """Solve with that window until it was learned from, and some times more where that is quick."""
    plan, clock = planner.forced(workload, window), planner.clock_of(workload)
    began = clock()
    whole = window >= planner.options.schedule.num_steps
    for k in range(MOST_PREPARING + REPEATS):
        if whole not in workload.stats.corrections or (k <= REPEATS and clock() - began < WARMUP_SECONDS):
            solve_in_rounds(planner, workload, request, plan, planner.system(workload), time.perf_counter())
