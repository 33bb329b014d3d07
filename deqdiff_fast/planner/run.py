"""Solves that follow a plan, and what is learned from them."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

import torch

from ..engine.checked_timesteps import AFTERWARDS
from ..engine.conclude import conclude, no_samples
from ..engine.progress import Reporter
from ..engine.serial import finish_serially
from ..engine.solve import Head, Request, plain_chain, plain_solution, solve_rounds, solve_serially
from ..engine.system import System
from ..engine.workspace import Workspace
from ..plan import Plan, RoundEstimate
from ..schedule.cache import seconds_of_tables
from ..solution import Solution, Stats
from ..solver.picard import Picard
from .monitor import ABORT_RATIO, SlowSolveMonitor
from .planner import Planner
from .probe import may_probe, measure_sizes
from .timed_steps import ENOUGH, TIMED_STEPS, count_steps, time_plain_steps, time_seen_steps
from .workload import Workload


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
        if first or (by_rounds and planner.check_due(workload)):
            return _timed_start(planner, workload, request, start, first)
        clock, probes = planner.clock_of(workload), None
        began = clock()
        if may_probe(workload):
            probes = planner.system(workload)
            measure_sizes(planner, workload, probes)
        plan = planner.plan(workload)
        stats.measure_budget -= clock() - began
        system = planner.system(workload, serial=plan.serial)
        if probes is not None:
            system.model_evals, system.model_calls = probes.model_evals, probes.model_calls
        if not plan.serial:
            return solve_in_rounds(planner, workload, request, plan, system, start)
        began = clock()
        solution = solve_serially(system, options, request)
        if request.callback is None:
            planner.record_serial(workload, system.num_steps, clock() - began)
        solution.stats.plan, solution.stats.wall_seconds = plan, time.perf_counter() - start
        return solution


def solve_in_rounds(
    planner: Planner, workload: Workload, request: Request, plan: Plan, system: System, start: float,
    begun: Workspace | None = None, front: int = 0,
) -> Solution:  # fmt: skip
    """By rounds. start: `time.perf_counter()` at the start. begun: a workspace in which the first `front` steps were
    made already: nothing is learned from such a solve. Nor from the first ones that have to prepare what later ones
    find prepared, unless they are slower than the serial chain beside that."""
    options, clock, evals = planner.options, planner.clock_of(workload), system.model_evals
    began = clock()
    system.max_batch, window = plan.chosen.piece, plan.chosen.window
    calls = workload.stats.costs.curve()
    system.cheaper = () if calls is None else calls.padding()
    stats = Stats(solver=options.solver.name, window=window, plan=plan)
    step, nodes = workload.stats.costs.step(workload.batch) or 0.0, planner.on_nodes(workload, window)
    taken_over = 0 if nodes else front  # rounds on nodes begin at the noise
    full_rounds = planner.full_rounds(workload, system.max_batch or workload.batch) if nodes else None
    system.all_nodes &= full_rounds is None or full_rounds <= ABORT_RATIO * step * system.num_steps
    monitor = SlowSolveMonitor(plan, step, taken_over, clock, nodes, full_rounds)
    head = None if begun is None else Head(begun, front)
    prepared = seconds_of_tables(options.schedule)
    solution = solve_rounds(system, options, request, stats, start, head, monitor)
    tables = seconds_of_tables(options.schedule) - prepared
    tables = tables if options.ranks is None else options.ranks.first(tables)
    slow = clock() - began - tables > step * system.num_steps  # even without them
    believed = planner.believes(workload, window, tables > 0 and not slow)
    usual = taken_over == 0 and (stats.check_evals <= AFTERWARDS or monitor.gave_up)
    if stats.stop_reason != "callback" and believed and usual:
        seconds, rows, share = clock() - began - monitor.outside, stats.model_evals - evals, 1.0
        rounds = float(stats.rounds)
        if monitor.gave_up and monitor.rounds:  # it counts with what it would still have taken
            share += monitor.left / monitor.rounds
            seconds, rows, rounds = monitor.spent * share, monitor.rows, monitor.rounds
        taken = RoundEstimate(rounds * share, rows * share / (system.num_steps * system.batch))
        planner.record_rounds(workload, window, taken, seconds, gave_up=monitor.gave_up)
    return solution


def _timed_start(planner: Planner, workload: Workload, request: Request, start: float, first: bool) -> Solution:
    """Start serially and time that. Where nothing is known, measure a batch too. Go on as it then seems best."""
    options = planner.options
    system = planner.system(workload)
    chain = plain_chain(system, request, keep=True)
    if chain is None:
        return _timed_where_seen(planner, workload, request, start, first)
    request, steps = replace(request, generator=chain.frozen), system.num_steps
    until = min(count_steps(workload, first), steps)
    step = time_plain_steps(planner, workload, chain, until, first)
    if step is None or not chain.finite():
        return _timed_where_seen(planner, workload, request, start, first)
    plan = _plan_by(planner, workload, system, step, first)
    if (steps - until) * step > (math.inf if plan.serial else plan.chosen.seconds or 0.0):  # else go on as begun
        head = None
        if planner.on_nodes(workload, plan.chosen.window):
            workload.stats.measure_budget -= step * until  # they begin at the noise
        else:
            head = Workspace.open(system, Picard(), 1, options.memory, options.backend)
            head.begin(workload.noise, chain.frozen)
            chain.hand_over(head)
        return solve_in_rounds(planner, workload, request, plan, system, start, head, until)
    chain.keep(options.schedule.lags)  # no solve will take over
    clock, stats = planner.clock_of(workload), Stats(solver="serial", window=1, stop_reason="serial", plan=plan)
    began = clock()
    solution = plain_solution(chain, stats, start) if chain.advance(steps) else None
    if solution is None:
        system.model_evals = system.model_calls = 0
        solution = solve_serially(system, options, request)
        solution.stats.plan = plan
    elif steps >= 2 * until:
        planner.record_serial(workload, steps - until, clock() - began)
    return solution


def _plan_by(planner: Planner, workload: Workload, system: System, step: float, first: bool) -> Plan:
    """The plan once a step was timed."""
    clock = planner.clock_of(workload)
    began = clock()
    if first:
        few = step * TIMED_STEPS < ENOUGH
        planner.record_first_steps(workload, system, step, few)
        measure_sizes(planner, workload, system)
    else:
        planner.record_check(workload, step)
    plan = planner.plan(workload)
    workload.stats.measure_budget -= clock() - began
    return plan


def _timed_where_seen(planner: Planner, workload: Workload, request: Request, start: float, first: bool) -> Solution:
    """`_timed_start` in the solver's memory, where somebody looks on."""
    options = planner.options
    system = planner.system(workload)
    steps = system.num_steps
    stats = Stats(solver="serial", window=1, stop_reason="serial")
    work = Workspace.open(system, Picard(), 1, options.memory, options.backend)
    with work.lease, Reporter(work, 0.0, steps, request.callback, request.progress) as report:
        work.begin(workload.noise, request.generator)
        front, until = [0] * workload.batch, min(count_steps(workload, first), steps)
        step, stopped = time_seen_steps(planner, workload, work, front, report, until, first)
        if not stopped:
            stats.plan = _plan_by(planner, workload, system, step, first)
            if not stats.plan.serial and until < steps:
                return solve_in_rounds(planner, workload, request, stats.plan, system, start, work, until)
            _, stopped = finish_serially(work, front, until, report)
        stats.rounds = stats.finished_serially = max(front)
        return conclude(work, front, stopped, stats, start, request.return_trajectory, options.on_failure, report)
