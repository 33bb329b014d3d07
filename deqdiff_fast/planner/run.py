"""Solves that follow a plan, and what is learned from them."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ..engine.checked_timesteps import AFTERWARDS
from ..engine.conclude import conclude
from ..engine.progress import Reporter
from ..engine.serial import Report, finish_serially
from ..engine.solve import Head, Request, no_samples, solve_rounds, solve_serially
from ..engine.system import System
from ..engine.workspace import Workspace
from ..plan import Plan, RoundEstimate
from ..solution import Solution, Stats
from ..solver.picard import Picard
from .monitor import SlowSolveMonitor
from .planner import Planner, Workload
from .probe import may_probe, measure_sizes

TIMED_STEPS = 4  # made serially and timed where that is due; the first one, which prepares, is not believed


def solve_planned(planner: Planner, request: Request, model_kwargs: dict[str, Any] | None) -> Solution:
    """As the planner thinks best. Raises what `DEQSampler.sample` raises."""
    noise, options, start = request.noise, planner.options, time.perf_counter()
    if noise.shape[0] == 0:
        return no_samples(noise, Stats(solver="serial", window=1, stop_reason="serial"))
    warm = request.init_trajectory is not None
    workload = planner.workload(noise, model_kwargs, warm, request.return_trajectory)
    stats = workload.stats
    with torch.no_grad():
        first, by_rounds = stats.costs.step(workload.batch) is None, stats.plan is not None and not stats.plan.serial
        if first or (by_rounds and planner.check_due(stats)):
            return _timed_start(planner, workload, request, start, first)
        began, probes = planner.clock(), None
        if may_probe(workload):
            probes = options.system(noise, model_kwargs)
            measure_sizes(planner, workload, probes)
        plan = planner.plan(workload)
        stats.measure_budget -= planner.clock() - began
        system = options.system(noise, model_kwargs, serial=plan.serial)
        if probes is not None:
            system.model_evals, system.model_calls = probes.model_evals, probes.model_calls
        if not plan.serial:
            return solve_in_rounds(planner, workload, request, plan, system, start)
        began = planner.clock()
        solution = solve_serially(system, options, request)
        if request.callback is None:
            planner.record_serial(workload, system.num_steps, planner.clock() - began)
        solution.stats.plan, solution.stats.wall_seconds = plan, time.perf_counter() - start
        return solution


def solve_in_rounds(
    planner: Planner,
    workload: Workload,
    request: Request,
    plan: Plan,
    system: System,
    start: float,
    begun: Workspace | None = None,
    front: int = 0,
    believed: bool = True,
) -> Solution:
    """By rounds. start: `time.perf_counter()` at the start. begun: a workspace in which the first `front` steps were
    made already. believed: learn from it; not where it had to prepare what later ones find prepared."""
    options, began, evals = planner.options, planner.clock(), system.model_evals
    system.max_batch, window = plan.chosen.piece, plan.chosen.window
    stats = Stats(solver=options.solver.name, window=window, plan=plan)
    step, nodes = workload.stats.costs.step(workload.batch) or 0.0, planner.on_nodes(workload, window)
    taken_over = 0 if nodes else front  # rounds on nodes begin at the noise
    full_rounds = planner.full_rounds(workload, system.max_batch or workload.batch) if nodes else None
    monitor = SlowSolveMonitor(plan, step, taken_over, planner.clock, nodes, full_rounds)
    head = None if begun is None else Head(begun, front)
    solution = solve_rounds(system, options, request, stats, start, head, monitor)
    if stats.stop_reason != "callback" and believed and stats.check_evals <= AFTERWARDS:
        seconds, rows, share = planner.clock() - began - monitor.outside, stats.model_evals - evals, 1.0
        rounds = stats.rounds - taken_over
        if monitor.gave_up and monitor.rounds:  # it counts with what it would still have taken
            share += monitor.left / monitor.rounds
            seconds, rows, rounds = monitor.spent * share, monitor.rows, monitor.rounds
        taken = RoundEstimate(rounds * share, rows * share / (system.num_steps * system.batch))
        planner.record_rounds(workload, window, taken, seconds, complete=taken_over == 0, gave_up=monitor.gave_up)
    return solution


def _timed_start(planner: Planner, workload: Workload, request: Request, start: float, first: bool) -> Solution:
    """Start serially and time that. Where nothing is known, measure a batch too. Go on as it then seems best."""
    options = planner.options
    system = options.system(workload.noise, workload.model_kwargs)
    steps = system.num_steps
    stats = Stats(solver="serial", window=1, stop_reason="serial")
    work = Workspace.open(system, Picard(), 1, options.memory, options.backend)
    with work.lease, Reporter(work, 0.0, steps, request.callback, request.progress) as report:
        work.begin(workload.noise, request.generator)
        front_steps = [0] * workload.batch
        taken, stopped = time_steps(planner, work, front_steps, report, min(TIMED_STEPS, steps))
        if not stopped:
            began = planner.clock()
            if first:
                planner.record_first_steps(workload, system, median(taken))
                measure_sizes(planner, workload, system)
            else:
                planner.record_check(workload, median(taken))
            stats.plan = planner.plan(workload)
            workload.stats.measure_budget -= planner.clock() - began
            if not stats.plan.serial and max(front_steps) < steps:
                plan, front = stats.plan, max(front_steps)
                return solve_in_rounds(planner, workload, request, plan, system, start, work, front, not first)
            _, stopped = finish_serially(work, front_steps, max(front_steps), report)
        stats.rounds = stats.finished_serially = max(front_steps)
        return conclude(work, front_steps, stopped, stats, start, request.return_trajectory, options.on_failure, report)


def time_steps(
    planner: Planner, work: Workspace, front_steps: list[int], report: Report | None, until: int
) -> tuple[list[float], bool]:
    """Make the steps up to state `until`. Seconds of each but the first, and whether `report` stopped it."""
    began, taken = [planner.clock()], []

    def timed(made: int, at: list[int], residual: Tensor) -> object:
        taken.append(planner.clock() - began[0])
        answer = None if report is None else report(made, at, residual)
        began[0] = planner.clock()
        return answer

    _, stopped = finish_serially(work, front_steps, 0, timed, until=until)
    return taken[1:] or taken, stopped
