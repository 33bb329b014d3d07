"""Solves that follow a plan, and what is learned from them."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ..engine.conclude import conclude
from ..engine.progress import Reporter
from ..engine.serial import Report, finish
from ..engine.solve import Request, nothing, solve_rounds, solve_serially
from ..engine.system import System
from ..engine.workspace import Workspace
from ..loop.coarse_grids import without_coarse
from ..plan import Plan, RoundEstimate
from ..solution import Solution, Stats
from ..solver.picard import Picard
from .decide import coarse_pays
from .monitor import SlowSolveMonitor
from .planner import Planner, Workload
from .probe import may_probe, measure_sizes

TIMED_STEPS = 4  # made serially and timed where that is due; the first one, which prepares, is not believed


@dataclass
class Job:
    """One planned solve.

    Attributes:
        load: the request, and what is known about its kind.
        request: the request, as the engine takes it.
        start: `time.perf_counter()` at its start.
        first: nothing was known before it, so it prepares whatever needs preparing, and its times are not believed.
    """

    load: Workload
    request: Request
    start: float
    first: bool = False


def solve_planned(planner: Planner, request: Request, model_kwargs: dict[str, Any] | None) -> Solution:
    """As the planner thinks best. Raises what `DEQSampler.sample` raises."""
    noise, options, start = request.noise, planner.options, time.perf_counter()
    if noise.shape[0] == 0:
        return nothing(noise, Stats(solver="serial", window=1, stop_reason="serial"))
    load = planner.workload(noise, model_kwargs, request.init_trajectory is not None)
    stats, job = load.stats, Job(load, request, start, load.stats.costs.step(load.batch) is None)
    with torch.no_grad():
        if job.first or (stats.plan is not None and not stats.plan.serial and planner.check_due(stats)):
            return _timed_start(planner, job)
        began, probes = planner.clock(), None
        if may_probe(load):
            probes = options.system(noise, model_kwargs)
            measure_sizes(planner, load, probes)
        plan = planner.plan(load)
        stats.measure_budget -= planner.clock() - began
        system = options.system(noise, model_kwargs, serial=plan.serial)
        if probes is not None:
            system.model_evals, system.model_calls = probes.model_evals, probes.model_calls
        return _serially(planner, job, plan, system) if plan.serial else solve_in_rounds(planner, job, plan, system)


def _serially(planner: Planner, job: Job, plan: Plan, system: System) -> Solution:
    began = planner.clock()
    solution = solve_serially(system, planner.options, job.request)
    solution.stats.plan = plan
    if job.request.callback is None:
        planner.record_serial(job.load, system.num_steps, planner.clock() - began)
    solution.stats.wall_seconds = time.perf_counter() - job.start
    return solution


def solve_in_rounds(
    planner: Planner, job: Job, plan: Plan, system: System, begun: Workspace | None = None, front: int = 0
) -> Solution:
    """By rounds; begun: a workspace in which the first `front` steps were made already."""
    options, load, began, evals = planner.options, job.load, planner.clock(), system.model_evals
    if not coarse_pays(plan):
        options = replace(options, solver=without_coarse(options.solver))
    system.max_batch, window = plan.chosen.piece, plan.chosen.window
    stats = Stats(solver=options.solver.name, window=window, plan=plan)
    monitor = SlowSolveMonitor(plan, load.stats.costs.step(load.batch) or 0.0, front, planner.clock)
    solution = solve_rounds(system, options, job.request, stats, job.start, begun, front, monitor)
    if stats.stop_reason != "callback" and not job.first:
        seconds, rows, share = planner.clock() - began - monitor.outside, stats.model_evals - evals, 1.0
        if monitor.gave_up:  # it counts with what it would still have taken
            share += monitor.left / monitor.rounds
            seconds, rows = monitor.spent * share, monitor.rows
        taken = RoundEstimate(monitor.rounds * share, rows * share / (system.num_steps * system.batch))
        planner.record_rounds(load, window, taken, seconds, complete=front == 0, gave_up=monitor.gave_up)
    return solution


def _timed_start(planner: Planner, job: Job) -> Solution:
    """Start serially and time that. Where nothing is known, measure a batch too. Go on as it then seems best."""
    options, load, request = planner.options, job.load, job.request
    system = options.system(load.noise, load.model_kwargs)
    steps = system.num_steps
    stats = Stats(solver="serial", window=1, stop_reason="serial")
    work = Workspace.open(system, Picard(), 1, options.memory, options.backend)
    with work.lease, Reporter(work, 0.0, steps, request.callback, request.progress) as report:
        work.begin(load.noise, request.generator)
        fronts = [0] * load.batch
        taken, stopped = time_steps(planner, work, fronts, report, min(TIMED_STEPS, steps))
        if not stopped:
            began = planner.clock()
            if job.first:
                planner.record_first_steps(load, system, median(taken))
                measure_sizes(planner, load, system)
            else:
                planner.record_check(load, median(taken))
            stats.plan = planner.plan(load)
            load.stats.measure_budget -= planner.clock() - began
            if not stats.plan.serial and max(fronts) < steps:
                return solve_in_rounds(planner, job, stats.plan, system, work, max(fronts))
            _, stopped = finish(work, fronts, max(fronts), report)
        stats.rounds = stats.finished_serially = max(fronts)
        return conclude(work, fronts, stopped, stats, job.start, request.keep, options.on_failure, report)


def time_steps(
    planner: Planner, work: Workspace, fronts: list[int], report: Report | None, until: int
) -> tuple[list[float], bool]:
    """Make the steps up to state `until`. Seconds of each but the first, and whether `report` stopped it."""
    began, taken = [planner.clock()], []

    def timed(made: int, at: list[int], residual: Tensor) -> object:
        taken.append(planner.clock() - began[0])
        answer = None if report is None else report(made, at, residual)
        began[0] = planner.clock()
        return answer

    _, stopped = finish(work, fronts, 0, timed, until=until)
    return taken[1:] or taken, stopped
