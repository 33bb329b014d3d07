"""The serial inversion that users know: the chain backwards, each step implicit and solved by fixed-point iteration."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .._types import Rows
from ..engine.workspace import Workspace
from . import multistep
from .base import InversionProblem, InversionStats, MethodResult, check_count, check_finite, noise_and_trajectory

WIDE_VARIANCE = 1e8  # at which all of the data is signal
STEP_TOL = 0.03  # part of the tolerance that one step may miss: the misses add up on their way to the image


@dataclass(frozen=True)
class FixedPoint:
    """x_i <- (x_{i+1} - b_i eps_i(x_i) - drift_i) / a_i, repeated for each step until it holds, image first.

    eps is the noise prediction, whatever the model predicts. The iteration diverges where |b_i d eps/dx| > |a_i|; the
    best state of such a step is returned. AIDI, Pan et al. 2023, arXiv 2309.04907, equation 8; ReNoise, Garibi et al.
    2024, arXiv 2403.14602.

    Args:
        iterations: most model calls in one step; a step ends sooner once it misses x_{i+1} by less than 0.03 `tol`,
            relative.
        sweeps: most passes over a multistep schedule, see `multistep.solve`.

    Raises:
        ValueError: a setting is not an int >= 1.
    """

    iterations: int = 50
    sweeps: int = 20

    name = "fixed_point"
    exact = True

    def __post_init__(self) -> None:
        check_count("iterations", self.iterations)
        check_count("sweeps", self.sweeps)

    def solve(self, problem: InversionProblem) -> MethodResult:
        """Find the noise, see `Method.solve`."""
        if problem.schedule.lags > 1:
            return multistep.solve(self, problem, self.sweeps)
        system = problem.system()
        work = problem.open_workspace(system)
        stats = InversionStats(self.name, 1)
        with work.lease:
            converged = _SerialInversion(self, problem, work, stats).run()
            noise, trajectory = noise_and_trajectory(work)
        stats.model_evals, stats.model_calls = system.model_evals, system.model_calls
        return MethodResult(noise, trajectory, converged, stats)


class _SerialInversion:
    """One solve."""

    def __init__(self, method: FixedPoint, problem: InversionProblem, work: Workspace, stats: InversionStats) -> None:
        self.method, self.problem, self.work, self.stats = method, problem, work, stats
        self.schedule, self.chain = problem.schedule, work.chain
        # d x_{i+1} / d x_i with the noise prediction held fixed: the limit of wide data
        factor = self.schedule.state_coef[:, 0] + self.schedule.model_coef[:, 0] * self.schedule.slope(WIDE_VARIANCE)
        self.factor = torch.where(factor.abs() > 1e-6, factor, 1.0).tolist()
        self.limit = problem.max_rounds or problem.schedule.num_steps * method.iterations

    def run(self) -> Tensor:
        """(B,) whether every step is within its tolerance."""
        steps, stats, bound = self.schedule.num_steps, self.stats, STEP_TOL * self.problem.tol
        worst = torch.zeros(self.chain.batch, dtype=torch.float64)
        stopped = callback_stopped = False
        for i in reversed(range(steps)):
            worst = torch.maximum(worst, self.step(i, bound))
            front = torch.full((self.chain.batch,), steps - i)
            callback_stopped = self.problem.notify(
                stats.rounds, self.limit, front, worst, bound, lambda: noise_and_trajectory(self.work)[0]
            )
            stopped = callback_stopped or stats.rounds >= self.limit
            if stopped:
                break
        converged = (worst <= bound) & (not stopped)
        stats.stop_reason = "callback" if callback_stopped else "converged" if bool(converged.all()) else "max_rounds"
        return converged

    def step(self, i: int, bound: float) -> Tensor:
        """Solve for state i given state i + 1. Returns (B,) the relative residual of the best state, on the CPU."""
        chain, schedule = self.chain, self.schedule
        a, b = float(schedule.state_coef[i, 0]), float(schedule.model_coef[i, 0])
        known = chain.states[i + 1] - (0.0 if chain.drift is None else chain.drift[i])
        scale = known.norm(dim=1).clamp_min(torch.finfo(known.dtype).tiny)
        x = best = chain.states[i + 1].clone()
        least = torch.full_like(scale, float("inf"))
        for _ in range(self.method.iterations):
            chain.states[i].copy_(x)
            self.work.evaluate(Rows(None, i, i + 1, chain.batch), self.stats.rounds + 1)
            self.stats.rounds += 1
            miss = known - a * x - b * chain.predictions[i]
            new, residual = x + miss / self.factor[i], miss.norm(dim=1) / scale
            check_finite(self.work, x, i, residual, self.stats.rounds)
            better = residual < least
            best = torch.where(better[:, None], new, best)
            least = torch.where(better, residual, least)
            if self.method.iterations == 1 or bool((least <= bound).all()) or self.stats.rounds >= self.limit:
                break
            x = torch.where(((residual <= bound) | ~residual.isfinite())[:, None], x, new)
        chain.states[i].copy_(best)
        return least.cpu().double()
