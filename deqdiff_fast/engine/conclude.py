"""The end of a solve: finish, raise or warn where rows are left, then copy the sample out of the solver's memory."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from .._types import OnFailure
from ..solution import Solution, Stats
from .reporting import report_not_converged
from .serial import Report, finish_serially
from .workspace import Workspace


def conclude(
    work: Workspace, front: list[int], stopped: bool, stats: Stats, started: float, return_trajectory: bool,
    on_failure: OnFailure, report: Report, gave_up: bool = False,
) -> Solution:  # fmt: skip
    """The solution of a loop that has left sample b final up to state front[b].

    Args:
        stopped: whether a callback asked for the end.
        started: `time.perf_counter()` at the start.
        report: called after every step that is finished serially; returning True stops.
        gave_up: the loop ended because finishing serially is faster.

    Raises:
        NotConvergedError: rows are left and `on_failure` is "raise".
    """
    system, chain = work.system, work.chain
    left = torch.tensor([final < system.num_steps for final in front])
    rounds_ran_out = min(front) < system.num_steps and not stopped
    if rounds_ran_out:
        stats.stop_reason = "replanned" if gave_up else "max_rounds"
        if gave_up or on_failure == "serial":
            stats.finished_serially, stopped = finish_serially(work, front, stats.rounds, report)
        if stats.finished_serially and not stopped:
            if len(stats.error_estimate) == system.batch:
                stats.error_estimate = stats.error_estimate.masked_fill(left, 0.0)
            stats.timesteps_evaluated = 1.0 if bool(left.all()) else stats.timesteps_evaluated
    if stopped:
        stats.stop_reason = "callback"
    if len(stats.error_estimate) != system.batch:  # a plain chain, which is exact
        stats.error_estimate = torch.zeros(system.batch, dtype=torch.float64)
    done = torch.tensor([final == system.num_steps for final in front])
    stats.model_evals, stats.model_calls = system.model_evals, system.model_calls
    stats.draft_evals = 0 if system.draft is None else system.draft.evals
    sample = system.from_basis(chain.states[-1]).view(system.batch, *system.shape).to(system.model_dtype)
    stats.wall_seconds = time.perf_counter() - started
    solution = Solution(sample, done, stats, work.trajectory() if return_trajectory else None)
    if rounds_ran_out and not gave_up and on_failure != "serial":
        worst = float(stats.residual_trace[-1].max()) if len(stats.residual_trace) else float("nan")
        report_not_converged(
            solution, on_failure,
            f"samples did not converge in {stats.rounds} rounds (largest residual {worst:.1e})",
            "raise max_rounds, loosen tol, or use on_failure='serial'", stacklevel=5,
        )  # fmt: skip
    return solution


def no_samples(noise: Tensor, stats: Stats) -> Solution:
    """The solution for a batch of none."""
    return Solution(noise.detach().clone(), torch.ones(0, dtype=torch.bool), stats)
