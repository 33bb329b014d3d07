"""Follows the gradient modes that run an iteration of their own, and makes its solution."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import replace

import torch
from torch import Tensor

from ..engine.reporting import ProgressBar, report_not_converged
from ..kernels.stopping import TINY_OF
from ..schedule.chain import serial_chain
from ..solution import RoundInfo, Solution, Stats, asks_to_stop
from .base import Problem
from .batched_vjp import BatchedVJP
from .implicit import Implicit

_log = logging.getLogger("deqdiff_fast")


class IterationMonitor:
    """Measures residuals, calls the user's callback, shows a progress bar, and says when the iteration ends.

    Args:
        name: of the iteration, for the statistics.
        limit: most rounds.
        exact: the round that makes every state exact whatever its residual says.
    """

    def __init__(self, problem: Problem, name: str, limit: int, exact: float = math.inf) -> None:
        self.bar = ProgressBar(problem.progress, name, "round", limit)
        self.problem, self.limit, self.exact, self.start_time = problem, limit, exact, time.perf_counter()
        self.stats = Stats(solver=name, window=problem.system.num_steps)
        self.trace: list[Tensor] = []
        self.done, self.broken = torch.zeros(problem.system.batch, dtype=torch.bool), False

    def update(self, states: Tensor, new: Tensor, predictions: Tensor) -> bool:
        """Note a round that went from `states` to `new`, both (T + 1, B, D); whether the iteration must end."""
        states, new, stats = states.detach(), new.detach(), self.stats
        size = new[1:].norm(dim=2).clamp_min(TINY_OF[new.dtype])
        residual = ((new - states)[1:].norm(dim=2) / size).cpu().double()
        self.broken = not bool(residual.isfinite().all())
        stats.rounds += 1
        self.done = (residual <= self.problem.tolerance).all(dim=0) | (stats.rounds >= self.exact and not self.broken)
        self.trace.append(residual.amax(dim=0))
        self.bar.show(stats.rounds, residual)
        if self.problem.callback is not None:
            info = self._info(residual, new, states, predictions.detach())
            stats.stop_reason = "callback" if asks_to_stop(self.problem.callback(info)) else "converged"
        return bool(self.done.all()) or self.broken or stats.stop_reason == "callback"

    def _info(self, residual: Tensor, new: Tensor, states: Tensor, predictions: Tensor) -> RoundInfo:
        system = self.problem.system

        def sample() -> Tensor:
            return new[-1].view(system.batch, *system.shape).to(system.model_dtype)

        def preview() -> Tensor:
            p, q = system.schedule.denoised_coef()[-1].tolist()
            denoised: Tensor = p * states[-2] + q * predictions[-1]
            return denoised.view(system.batch, *system.shape).to(system.model_dtype)

        return RoundInfo(
            round=self.stats.rounds,
            max_rounds=self.limit,
            num_steps=system.num_steps,
            front=(residual <= self.problem.tolerance).long().cumprod(dim=0).sum(dim=0),
            residual=self.trace[-1],
            tolerance=self.problem.tolerance,
            _preview=preview,
            _sample=sample,
        )

    def conclude(self, sample: Tensor, states: Tensor, drift: Tensor | None) -> Solution:
        """The solution after the last round, or where that failed what the sampler's `on_failure` asks for.

        Args:
            sample: (B, D) or (B, *shape), with the gradient of the iteration.
            states: (T + 1, B, D).
            drift: (T, B, D), the noise of every step times its coefficient; None for a deterministic chain.

        Raises:
            NotConvergedError: the iteration failed and `on_failure` is "raise".
        """
        converged = bool(self.done.all()) or self.stats.stop_reason == "callback"
        if converged and not self.broken:
            return self._solution(sample, states)
        self.stats.stop_reason = "max_rounds"
        if self.problem.on_failure == "serial":
            return self._finish_serially(drift)
        solution, worst = self._solution(sample, states), float(self.trace[-1].max())
        failure = f"samples did not converge in {self.stats.rounds} rounds (largest residual {worst:.1e})"
        remedy = "raise max_rounds, loosen tol, or use gradient='implicit'"
        report_not_converged(solution, self.problem.on_failure, failure, remedy, stacklevel=4)
        return solution

    def _solution(self, sample: Tensor, states: Tensor) -> Solution:
        system, stats = self.problem.system, self.stats
        stats.model_evals, stats.model_calls = system.model_evals, system.model_calls
        stats.residual_trace, stats.error_estimate = torch.stack(self.trace), self.trace[-1]
        stats.wall_seconds = time.perf_counter() - self.start_time
        shape = (system.batch, *system.shape)
        trajectory = states.detach().view(-1, *shape).to(system.model_dtype)
        return Solution(sample.view(shape).to(system.model_dtype), self.done, stats, trajectory)

    def _finish_serially(self, drift: Tensor | None) -> Solution:
        """The serial chain with the implicit gradient."""
        problem, system, stats = self.problem, self.problem.system, self.stats
        _log.info("%s: not converged in %d rounds; the chain is made serially", stats.solver, stats.rounds)
        vjp, noise = BatchedVJP(system, system.model_kwargs), problem.noise.detach().flatten(1).to(system.dtype)
        with torch.no_grad():
            states = torch.stack(serial_chain(system.schedule, noise, vjp.predict_step, drift))
        solution = self._solution(states[-1], states)
        stats.finished_serially = system.num_steps
        solution.converged = torch.ones_like(self.done)
        return Implicit().attach(replace(problem, solve=lambda: solution))
