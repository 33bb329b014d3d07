"""One solve from noise to sample: in parallel rounds, or as the plain chain."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from ._types import Generators
from .conclude import conclude
from .options import Options
from .progress import Reporter
from .serial import finish, non_finite
from .solution import Callback, Solution, Stats
from .solver import Late, Picard, iterate
from .system import System
from .workspace import Workspace


@dataclass
class Request:
    """What one call of `sample` or `serial` asks for."""

    noise: Tensor
    generator: Generators
    callback: Callback | None = None
    progress: bool = False
    init_trajectory: Tensor | None = None


def late_policy(system: System, request: Request) -> Late | None:
    """How far the host runs ahead of the device: not at all on a CPU, nor where somebody looks at every round."""
    watched = request.callback is not None or request.progress
    return None if system.device.type == "cpu" or watched else Late()


def solve_parallel(system: System, options: Options, request: Request, return_trajectory: bool) -> Solution:
    """All timesteps (or a window of them) at once, round after round. Raises what `DEQSampler.sample` raises."""
    clock = time.perf_counter()
    noise, steps, solver = request.noise, system.num_steps, options.solver
    window = steps if options.window == "auto" else min(int(options.window), steps)
    stats = Stats(solver=solver.name, window=window)
    if noise.shape[0] == 0:
        return _nothing(noise, stats)
    limit, tolerance = options.round_limit(), options.tolerance(noise.dtype)
    late, freeze = late_policy(system, request), options.freeze(noise.dtype)
    given = (solver, window, tolerance, freeze, request.init_trajectory is not None)

    def open_(system: System) -> Workspace:
        return Workspace.open(system, solver, window, options.memory, options.backend)

    with torch.no_grad(), options.residents.borrow(system, given, open_, late is not None) as (work, play, board):
        system = work.system
        with Reporter(work, tolerance, limit, request.callback, request.progress) as report:
            work.begin(noise, request.generator)
            work.guess(solver.guess, request.init_trajectory)
            outcome = iterate(
                work.chain,
                solver,
                work.memory,
                evaluate=work.evaluate,
                rebuild=work.rebuild,
                diagnose=lambda step, sample, at: non_finite(work, step, sample, at),
                freeze=freeze,
                finish=tolerance,
                max_rounds=limit,
                report=report,
                late=late,
                pad=system.pad_round,
                play=play,
                board=board,
            )
            system.model_evals -= outcome.padding
            stats.rounds, stats.repairs = outcome.rounds, outcome.repairs
            stats.residual_trace = torch.stack(outcome.trace) if outcome.trace else stats.residual_trace
            return conclude(
                work, outcome.window.lo, outcome.stopped, stats, clock, return_trajectory, options.on_failure, report
            )


def solve_serially(system: System, options: Options, request: Request, return_trajectory: bool) -> Solution:
    """The plain chain, one model call after the other. Raises what `DEQSampler.serial` raises."""
    clock = time.perf_counter()
    noise = request.noise
    stats = Stats(solver="serial", window=1, stop_reason="serial")
    if noise.shape[0] == 0:
        return _nothing(noise, stats)
    with torch.no_grad():
        work = Workspace.open(system, Picard(), 1, options.memory, options.backend)
        with work.lease, Reporter(work, 0.0, system.num_steps, request.callback, request.progress) as report:
            work.begin(noise, request.generator)
            fronts = [0] * noise.shape[0]
            stats.finished_serially, stopped = finish(work, fronts, 0, report)
            stats.rounds = stats.finished_serially
            return conclude(work, fronts, stopped, stats, clock, return_trajectory, options.on_failure, report)


def _nothing(noise: Tensor, stats: Stats) -> Solution:
    return Solution(noise.detach().clone(), torch.ones(0, dtype=torch.bool), stats)
