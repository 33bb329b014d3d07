"""One solve from noise to sample: in parallel rounds, or as the plain chain."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .._types import Generators
from ..loop.device import DeviceCalls, Lookahead
from ..loop.host import iterate
from ..loop.task import Evaluate, Play
from ..solution import Callback, Solution, Stats
from ..solver.picard import Picard
from .conclude import conclude
from .options import Options
from .progress import Reporter
from .serial import finish, non_finite
from .system import System
from .workspace import Workspace


class Monitor(Protocol):
    """Asked after every round, in the reporter's place, whether to go on."""

    gave_up: bool
    """Whether it was the monitor that ended the rounds."""

    def start(self, report: Reporter) -> Callable[[int, Any, Tensor], object]:
        """What is called after every round, which calls `report` as well."""
        ...


@dataclass
class Request:
    """What one call of `sample` or `serial` asks for."""

    noise: Tensor
    generator: Generators
    callback: Callback | None = None
    progress: bool = False
    init_trajectory: Tensor | None = None
    keep: bool = False
    """Whether the trajectory is returned."""


def lookahead_policy(system: System, request: Request) -> Lookahead | None:
    """How far the host runs ahead of a CUDA device; not at all elsewhere, nor where somebody looks at every round."""
    watched = request.callback is not None or request.progress
    return Lookahead() if system.device.type == "cuda" and not watched else None


def solve_parallel(system: System, options: Options, request: Request) -> Solution:
    """All timesteps (or a window of them) at once, round after round. Raises what `DEQSampler.sample` raises."""
    clock = time.perf_counter()
    window = system.num_steps if options.window == "auto" else min(int(options.window), system.num_steps)
    stats = Stats(solver=options.solver.name, window=window)
    return nothing(request.noise, stats) if system.batch == 0 else solve_rounds(system, options, request, stats, clock)


def solve_rounds(
    system: System,
    options: Options,
    request: Request,
    stats: Stats,
    clock: float,
    lead: Workspace | None = None,
    front: int = 0,
    monitor: Monitor | None = None,
) -> Solution:
    """By rounds over `stats.window` timesteps. clock: `time.perf_counter()` at the start.

    lead: a workspace of the same system in which the first `front` steps were made already; it is released. monitor:
    asked after every round; where it gives up, the rest is made serially.
    """
    solver, noise, limit = options.solver, request.noise, options.round_limit()
    tolerance, freeze = options.tolerance(noise.dtype), options.freeze(noise.dtype)
    warm = request.init_trajectory is not None
    late = None if hasattr(solver, "drive") else lookahead_policy(system, request)

    def open_(system: System) -> Workspace:
        return Workspace.open(system, solver, stats.window, options.memory, options.backend)

    given = (solver, stats.window, tolerance, freeze, warm, id(options.draft))
    recorded = late is not None and not getattr(system.draft, "conditional", False)
    with (
        torch.no_grad(),
        options.residents.borrow(system, given, open_, recorded) as (work, play, board),
        Reporter(work, tolerance, limit, request.callback, request.progress) as report,
    ):
        if lead is None:
            work.begin(noise, request.generator)
            work.guess(solver.guess, request.init_trajectory, play)
        else:
            work.resume(lead, front)
            lead.lease.release()
        pad = work.system.pad_round
        monitored = report if monitor is None else monitor.start(report)
        coarse: list[Tensor] = []
        stopped = False
        if not (warm or front):
            calls = None if board is None else DeviceCalls(board, work.chain, work.evaluate, pad, play)
            coarse, stopped = climb(work, limit, calls or work.evaluate, report if late is None else None, play)
            work.system.model_evals -= calls.padding if calls else 0
        outcome = iterate(
            work.chain,
            solver,
            work.memory,
            evaluate=work.evaluate,
            rebuild=work.rebuild,
            diagnose=lambda step, sample, at: non_finite(work, step, sample, at),
            freeze=freeze,
            finish=tolerance,
            floor=options.floor(noise.dtype),
            reach=options.reach(noise.dtype),
            left=options.left(noise.dtype),
            before=coarse[-1] if coarse else None,
            max_rounds=0 if stopped else limit,
            report=monitored,
            start=front,
            made=len(coarse),
            late=late,
            pad=pad,
            play=play,
            board=board,
            warm=warm,
        )
        work.system.model_evals -= outcome.padding
        stats.rounds, stats.coarse_rounds, stats.repairs = front + outcome.rounds, len(coarse), outcome.repairs
        trace = [residual.cpu() for residual in coarse] + outcome.trace
        stats.residual_trace = torch.stack(trace) if trace else stats.residual_trace
        gave_up = monitor is not None and monitor.gave_up
        fronts, stopped = outcome.window.lo, stopped or (outcome.stopped and not gave_up)
        solution = conclude(work, fronts, stopped, stats, clock, request.keep, options.on_failure, report, gave_up)
    if work.system is not system:
        stats.model_evals += system.model_evals
        stats.model_calls += system.model_calls
    return solution


def climb(
    work: Workspace, limit: int, evaluate: Evaluate, report: Reporter | None, play: Play
) -> tuple[list[Tensor], bool]:
    """The rounds on coarse grids that the solver wants first: their residuals, and whether `report` asked to stop."""
    ascent = work.ascent
    if ascent is None or len(ascent.grids) >= limit:
        return [], False
    stopped = ascent.run(evaluate, report, play)
    return ascent.trace, stopped


def solve_serially(system: System, options: Options, request: Request) -> Solution:
    """The plain chain, one model call after the other. Raises what `DEQSampler.serial` raises."""
    clock = time.perf_counter()
    noise = request.noise
    stats = Stats(solver="serial", window=1, stop_reason="serial")
    if noise.shape[0] == 0:
        return nothing(noise, stats)
    with torch.no_grad():
        work = Workspace.open(system, Picard(), 1, options.memory, options.backend)
        with work.lease, Reporter(work, 0.0, system.num_steps, request.callback, request.progress) as report:
            work.begin(noise, request.generator)
            fronts = [0] * noise.shape[0]
            stats.finished_serially, stopped = finish(work, fronts, 0, report)
            stats.rounds = stats.finished_serially
            return conclude(work, fronts, stopped, stats, clock, request.keep, options.on_failure, report)


def nothing(noise: Tensor, stats: Stats) -> Solution:
    """The solution for no samples."""
    return Solution(noise.detach().clone(), torch.ones(0, dtype=torch.bool), stats)
