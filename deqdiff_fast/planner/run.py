"""Solves that follow a plan, and what is learned from them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ..engine.conclude import conclude
from ..engine.options import Options
from ..engine.progress import Reporter
from ..engine.serial import Report, finish_serially
from ..engine.solve import Head, Request, no_samples, solve_rounds, solve_serially
from ..engine.system import System
from ..engine.workspace import Workspace
from ..model.padding import padded_sizes
from ..plan import Plan, RoundEstimate
from ..solution import Solution, Stats
from ..solver.picard import Picard
from .decide import coarse_pays
from .measure import time_call
from .monitor import SlowSolveMonitor
from .planner import Planner, WorkloadStats
from .probe import may_probe, measure_all, probe, worth_trying

LEAD = 4  # steps of an unmeasured chain that are made serially and timed; the first one is not believed
CHECKED = 3  # the same where it is only looked at again
SECONDS, MANY, TIMES = 0.25, 400, 5  # what a warm-up spends on serial steps and on each solve: seconds, steps, solves


@dataclass
class Job:
    """One planned solve."""

    site: WorkloadStats
    request: Request
    model_kwargs: dict[str, Any] | None
    first: bool = False
    """Nothing was known before it, so it prepares whatever needs preparing, and its times are not believed."""
    probes: System | None = None
    """What was called to measure, before the solve."""
    wall: float = field(default_factory=time.perf_counter)

    @property
    def noise(self) -> Tensor:
        return self.request.noise


def solve_planned(planner: Planner, request: Request, model_kwargs: dict[str, Any] | None) -> Solution:
    """As the planner thinks best. Raises what `DEQSampler.sample` raises."""
    noise = request.noise
    if noise.shape[0] == 0:
        return no_samples(noise, Stats(solver="serial", window=1, stop_reason="serial"))
    site = planner.site(noise, model_kwargs, request.init_trajectory is not None)
    job = Job(site, request, model_kwargs)
    with torch.no_grad():
        if site.costs.step(site.batch) is None:
            return _serial_start(planner, job)
        if site.plan is not None and not site.plan.serial and planner.check_due(site):
            return _serial_start(planner, job)
        started = planner.clock()
        job.probes = probe(planner, site, noise, model_kwargs) if may_probe(site) else None
        plan = planner.plan(site, noise, model_kwargs)
        site.allowance -= planner.clock() - started
        system = planner.options.system(noise, model_kwargs, serial=plan.serial)
        return _serially(planner, job, plan, system) if plan.serial else _in_rounds(planner, job, plan, system)


def _serially(planner: Planner, job: Job, plan: Plan, system: System) -> Solution:
    start = planner.clock()
    solution = solve_serially(system, planner.options, job.request)
    solution.stats.plan = plan
    if job.request.callback is None:
        planner.record_serial(job.site, system.num_steps, planner.clock() - start)
    return _charged(solution, job)


def _in_rounds(
    planner: Planner, job: Job, plan: Plan, system: System, lead: Workspace | None = None, front: int = 0
) -> Solution:
    """By rounds; lead: a workspace in which the first `front` steps were made already."""
    options, request, start = planner.options, job.request, planner.clock()
    if not coarse_pays(plan):
        options = replace(options, solver=options.solver.without_coarse_grids())
    made, system.max_batch = system.model_evals, plan.chosen.piece
    stats = Stats(solver=options.solver.name, window=plan.chosen.window, plan=plan)
    monitor = SlowSolveMonitor(plan, job.site.costs.step(job.site.batch) or 0.0, front, planner.clock)
    head = None if lead is None else Head(lead, front)
    solution = solve_rounds(system, options, request, stats, job.wall, head, monitor)
    if stats.stop_reason != "callback" and not job.first:
        seconds, rows, share = planner.clock() - start - monitor.outside, stats.model_evals - made, 1.0
        if monitor.gave_up:  # it counts with what it would still have taken
            share += monitor.left / monitor.rounds
            seconds, rows = monitor.spent * share, monitor.rows
        seen = RoundEstimate(monitor.rounds * share, rows * share / (system.num_steps * system.batch))
        window, sure, whole = plan.chosen.window, monitor.gave_up, front == 0
        planner.record_rounds(job.site, system, job.noise, seen, seconds, window, sure, whole)
    return _charged(solution, job)


def _charged(solution: Solution, job: Job) -> Solution:
    """With what was spent on measuring."""
    stats, probes = solution.stats, job.probes
    if probes is not None:
        stats.model_evals += probes.model_evals
        stats.model_calls += probes.model_calls
    stats.wall_seconds = time.perf_counter() - job.wall
    return solution


def _serial_start(planner: Planner, job: Job) -> Solution:
    """Start serially and time that. Where nothing is known, measure a batch too. Go on as it then seems best."""
    options, site, request = planner.options, job.site, job.request
    job.first = site.costs.step(site.batch) is None
    system = options.system(job.noise, job.model_kwargs)
    steps = system.num_steps
    stats = Stats(solver="serial", window=1, stop_reason="serial")
    work = Workspace.open(system, Picard(), 1, options.memory, options.backend)
    with work.lease, Reporter(work, 0.0, steps, request.callback, request.progress) as report:
        work.begin(job.noise, request.generator)
        fronts = [0] * site.batch
        taken, stopped = time_steps(planner, work, fronts, report, min(LEAD if job.first else CHECKED, steps))
        if not stopped:
            started = planner.clock()
            if job.first:
                planner.record_lead(site, system, job.noise, median(taken))
                probe(planner, site, job.noise, job.model_kwargs, system)
            else:
                planner.record_check(site, median(taken))
            stats.plan = planner.plan(site, job.noise, job.model_kwargs)
            site.allowance -= planner.clock() - started
            if not stats.plan.serial and max(fronts) < steps:
                return _in_rounds(planner, job, stats.plan, system, work, max(fronts))
            _, stopped = finish_serially(work, fronts, max(fronts), report)
        stats.rounds = stats.finished_serially = max(fronts)
        return conclude(work, fronts, stopped, stats, job.wall, request.return_trajectory, options.on_failure, report)


def time_steps(
    planner: Planner, work: Workspace, fronts: list[int], report: Report | None, until: int
) -> tuple[list[float], bool]:
    """Make the steps up to state `until`. Seconds of each but the first, and whether `report` stopped it."""
    clock = planner.clock
    since, taken = [clock()], []

    def timed(made: int, at: list[int], residual: Tensor) -> object:
        taken.append(clock() - since[0])
        answer = None if report is None else report(made, at, residual)
        since[0] = clock()
        return answer

    _, stopped = finish_serially(work, fronts, 0, timed, until=until)
    return taken[1:] or taken, stopped


def compile_sizes(options: Options, system: System, noise: Tensor) -> None:
    """Call a compiled model once with every size that a solve may call it with; nothing for a plain one."""
    if system.padded:
        for rows in padded_sizes(options.most_rows(noise), system.batch):
            time_call(system, noise, rows)


def warm_up(planner: Planner, noise: Tensor, model_kwargs: dict[str, Any] | None) -> Plan:
    """Measure calls and steps, then make the solves that look best, once to prepare and some times to learn from."""
    options, site = planner.options, planner.site(noise, model_kwargs)
    draw: Callable[[], torch.Generator] = lambda: torch.Generator(noise.device).manual_seed(0)  # noqa: E731
    with torch.no_grad():
        system = options.system(noise, model_kwargs)
        compile_sizes(options, system, noise)
        work = Workspace.open(system, Picard(), 1, options.memory, options.backend)
        with work.lease:
            work.begin(noise, draw())
            taken, _ = time_steps(planner, work, [0] * site.batch, None, min(2 * LEAD + 1, system.num_steps))
            while sum(taken) + median(taken) * system.num_steps < SECONDS and len(taken) < MANY:
                taken += time_steps(planner, work, [0] * site.batch, None, system.num_steps)[0]
        planner.record_lead(site, system, noise, median(taken))
        measure_all(planner, site, system, noise, model_kwargs)
        for candidate in worth_trying(planner, site, noise, model_kwargs):
            _try(planner, Job(site, Request(noise, draw()), model_kwargs), candidate.window)
        site.allowance = 0.0
        planner.forget_plan(site)
        return planner.plan(site, noise, model_kwargs)


def _try(planner: Planner, job: Job, window: int) -> None:
    """Solve with that window some times and remember how far the prediction was off, by the median but the first."""
    site, began = job.site, planner.clock()
    ratios: list[float] = []
    plan = planner.forced(site, job.noise, job.model_kwargs, window)
    while len(ratios) < 2 or (len(ratios) < TIMES and planner.clock() - began < SECONDS):
        site.corrections.pop(window, None)
        _in_rounds(planner, job, plan, planner.options.system(job.noise, job.model_kwargs))
        ratios.append(site.corrections.get(window, 1.0))
    site.corrections[window] = median(ratios[1:])
