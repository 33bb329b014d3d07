"""Plain-torch rounds, for the gradient modes that run an iteration of their own instead of the sampler's solve."""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..engine.system import System
from ..errors import ConvergenceWarning, NotConvergedError
from ..schedule.chain import serial_chain
from ..schedule.noise import fill_drift
from ..solution import RoundInfo, Solution, Stats
from .base import Problem
from .rows import Rows

_log = logging.getLogger("deqdiff_fast")
Predict = Callable[[Tensor, Tensor, Tensor], Tensor]


class RoundMap:
    """f(Z) = the solution of the chain whose predictions are linear around Z, E(Z) + c (X - Z), c the scalar slope.

    Its fixed point is the chain (Lim et al. 2024, arXiv 2309.12252); states are (T + 1, B, D), row 0 the noise.
    """

    def __init__(self, system: System, drift: Tensor | None) -> None:
        schedule = system.schedule
        self.system, self.drift = system, drift
        self.state_coef, self.model_coef = schedule.state_coef.tolist(), schedule.model_coef.tolist()
        self.slope, self.lags = schedule.slope().tolist(), schedule.lags

    def scan(self, noise: Tensor, states: Tensor, predictions: Tensor) -> Tensor:
        """The next states from those (T + 1, B, D) at which the predictions (T, B, D) were made; differentiable."""
        new, outs = [noise], []
        for i in range(self.system.num_steps):
            outs.append(predictions[i] + self.slope[i] * (new[i] - states[i]))
            x = self.drift[i].to(noise.dtype) if self.drift is not None else torch.zeros_like(noise)
            for lag in range(min(self.lags, i + 1)):
                x = x + self.state_coef[i][lag] * new[i - lag] + self.model_coef[i][lag] * outs[i - lag]
            new.append(x)
        return torch.stack(new)

    def guess(self, noise: Tensor) -> Tensor:
        """The chain of unit Gaussian data, whose model is linear: a starting trajectory without a model call."""
        zeros = noise.new_zeros(self.system.num_steps + 1, *noise.shape)
        return self.scan(noise, zeros, zeros[1:])


def frozen_noise(problem: Problem) -> Tensor | None:
    """(T, B, D): the chain's noise times its coefficients; None for a deterministic chain."""
    system = problem.system
    if not system.schedule.stochastic:
        return None
    drift = torch.empty(system.num_steps, system.batch, system.numel, dtype=system.dtype, device=system.device)
    fill_drift(drift, system.schedule, tuple(problem.noise.shape), problem.generator, problem.noise.dtype)
    return drift


def start(problem: Problem, f: RoundMap, noise: Tensor) -> Tensor:
    """(T + 1, B, D): the given trajectory with this noise, or the guess."""
    if problem.init_trajectory is None:
        return f.guess(noise)
    rest = problem.init_trajectory[1:].detach().flatten(2).to(noise.device, noise.dtype)
    return torch.cat([noise[None], rest])


def chain(rows: Rows, noise: Tensor, drift: Tensor | None, predict: Predict) -> Tensor:
    """The serial chain from noise (B, D) as plain torch, differentiable: (T + 1, B, D). Raises NonFiniteError."""
    who = torch.arange(rows.system.batch, device=rows.system.device)
    by_step: Callable[[Tensor, int], Tensor] = lambda x, i: predict(x, torch.full_like(who, i), who)  # noqa: E731
    return torch.stack(serial_chain(rows.system.schedule, noise, by_step, drift))


class Watch:
    """Follows an iteration: residuals, the user's callback, a progress bar, and the solution in the end."""

    def __init__(self, problem: Problem, name: str, limit: int, exact: float = math.inf) -> None:
        """exact: the round that makes every state exact whatever its residual says."""
        self.problem, self.limit, self.exact, self.clock = problem, limit, exact, time.perf_counter()
        self.stats = Stats(solver=name, window=problem.system.num_steps)
        self.trace: list[Tensor] = []
        self.done, self.broken = torch.zeros(problem.system.batch, dtype=torch.bool), False
        self.bar: Any = tqdm(total=limit, unit="round", desc=name) if problem.progress else None

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def __call__(self, states: Tensor, new: Tensor, predictions: Tensor) -> bool:
        """Note a round that went from `states` to `new`, both (T + 1, B, D); whether the iteration must end."""
        states, new, stats = states.detach(), new.detach(), self.stats
        residual = ((new - states)[1:].norm(dim=2) / new[1:].norm(dim=2).clamp_min(1e-30)).double().cpu()
        self.broken = not bool(residual.isfinite().all())
        stats.rounds += 1
        self.done = (residual <= self.problem.tolerance).all(dim=0) | (stats.rounds >= self.exact and not self.broken)
        self.trace.append(residual.amax(dim=0))
        if self.bar is not None:
            self.bar.update()
            self.bar.set_postfix(residual=f"{float(residual.max()):.1e}")
        if self.problem.callback is not None:
            info = self._info(residual, new, states, predictions.detach())
            stats.stop_reason = "callback" if self.problem.callback(info) is True else "converged"
        return bool(self.done.all()) or self.broken or stats.stop_reason == "callback"

    def _info(self, residual: Tensor, new: Tensor, states: Tensor, predictions: Tensor) -> RoundInfo:
        system = self.problem.system

        def sample() -> Tensor:
            return new[-1].view(system.batch, *system.shape).to(system.model_dtype)

        def preview() -> Tensor:
            p, q = system.schedule.denoised_coef()[-1].tolist()
            clean: Tensor = p * states[-2] + q * predictions[-1]
            return clean.view(system.batch, *system.shape).to(system.model_dtype)

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

    @property
    def failed(self) -> bool:
        """Out of rounds, or out of the numbers' range."""
        return self.broken or not (bool(self.done.all()) or self.stats.stop_reason == "callback")

    def solution(self, sample: Tensor, trajectory: Tensor) -> Solution:
        """The solution of the iteration as it ended; raises or warns where it failed and was asked to."""
        system, stats = self.problem.system, self.stats
        stats.model_evals, stats.model_calls = system.model_evals, system.model_calls
        stats.residual_trace = torch.stack(self.trace)
        stats.wall_seconds = time.perf_counter() - self.clock
        shape = (system.batch, *system.shape)
        kept = trajectory.detach().view(-1, *shape).to(system.model_dtype)
        solution = Solution(sample.view(shape).to(system.model_dtype), self.done, stats, kept)
        if self.failed:
            stats.stop_reason = "max_rounds"
            if self.problem.on_failure != "serial":
                message = (
                    f"{stats.solver}: {int((~self.done).sum())} of {system.batch} samples did not converge in "
                    f"{stats.rounds} rounds (largest residual {float(self.trace[-1].max()):.1e}); raise max_rounds, "
                    "loosen tol, or use gradient='implicit'"
                )
                if self.problem.on_failure == "raise":
                    raise NotConvergedError(message, solution)
                warnings.warn(message, ConvergenceWarning, stacklevel=5)
        return solution


def finish_serially(problem: Problem, watch: Watch, drift: Tensor | None) -> Problem:
    """The same problem with the serial chain for its solve: the way out of an iteration that failed."""
    system, stats = problem.system, watch.stats
    _log.info("%s: not converged in %d rounds; the chain is made serially", stats.solver, stats.rounds)
    rows = Rows(system, system.model_kwargs)
    with torch.no_grad():
        states = chain(rows, problem.noise.detach().flatten(1).to(system.dtype), drift, rows.predict)
    solution = watch.solution(states[-1], states)
    stats.stop_reason, stats.finished_serially = "max_rounds", system.num_steps
    solution.converged = torch.ones_like(watch.done)
    return replace(problem, solve=lambda: solution)
