"""The serial inversion that users know: the chain backwards, each step implicit and solved by fixed-point iteration."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from .._types import Rows
from ..engine.workspace import Workspace
from . import multistep
from .base import InversionInfo, InversionStats, Outcome, Task, check_finite, read_out

WIDE = 1e8  # a variance at which all of the data is signal
SAFETY = 0.03  # part of the tolerance that one step may miss: the misses add up on their way to the image


@dataclass(frozen=True)
class FixedPoint:
    """x_i <- (x_{i+1} - b_i eps_i(x_i) - drift_i) / a_i, repeated for each step until it holds, image first.

    eps: the noise prediction, whatever the model predicts.
    iterations: most model calls in one step; a step ends sooner once it misses x_{i+1} by less than 0.03 `tol`,
    relative. AIDI, Pan et al. 2023, arXiv 2309.04907, equation 8; ReNoise, Garibi et al. 2024, arXiv 2403.14602.
    sweeps: most passes over a multistep schedule, see `multistep.solve`. The iteration
    diverges where |b_i d eps/dx| > |a_i|; the best state of such a step is kept.
    """

    iterations: int = 50
    sweeps: int = 20

    name = "fixed_point"
    exact = True

    def __post_init__(self) -> None:
        for field in ("iterations", "sweeps"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{field}: expected an int >= 1, got {value!r}")

    def solve(self, task: Task) -> Outcome:
        if task.schedule.lags > 1:
            return multistep.solve(self, task, self.sweeps)
        clock = time.perf_counter()
        system = task.system()
        work = task.open(system)
        stats = InversionStats(self.name, 1)
        with work.lease:
            walk = _Walk(self, task, work, stats)
            converged = walk.run()
            noise, trajectory = read_out(work)
        stats.stop_reason = "callback" if walk.asked else "converged" if bool(converged.all()) else "max_rounds"
        stats.model_evals, stats.model_calls = system.model_evals, system.model_calls
        stats.wall_seconds = time.perf_counter() - clock
        return Outcome(noise, trajectory, converged, stats)


class _Walk:
    """One solve."""

    def __init__(self, method: FixedPoint, task: Task, work: Workspace, stats: InversionStats) -> None:
        self.method, self.task, self.work, self.stats = method, task, work, stats
        self.schedule, self.chain = task.schedule, work.chain
        # d x_{i+1} / d x_i with the noise prediction held fixed: the limit of wide data
        factor = self.schedule.state_coef[:, 0] + self.schedule.model_coef[:, 0] * self.schedule.slope(WIDE)
        self.factor = torch.where(factor.abs() > 1e-6, factor, 1.0).tolist()
        self.limit = task.max_rounds or task.schedule.num_steps * method.iterations
        self.stopped = self.asked = False  # whether it ends here, and whether the user asked for that

    def run(self) -> Tensor:
        """(B,) whether every step held to tolerance."""
        chain, steps = self.chain, self.schedule.num_steps
        bound = SAFETY * self.task.tol
        worst = torch.zeros(chain.batch, dtype=torch.float64)
        for i in reversed(range(steps)):
            worst = torch.maximum(worst, self.step(i, bound))
            if self._report(steps - i, worst):
                break
        held = worst <= bound
        return held & (not self.stopped)

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
            new, missed = x + miss / self.factor[i], miss.norm(dim=1) / scale
            check_finite(self.work, x, i, missed, self.stats.rounds)
            better = missed < least
            best = torch.where(better[:, None], new, best)
            least = torch.where(better, missed, least)
            if self.method.iterations == 1 or bool((least <= bound).all()) or self.stats.rounds >= self.limit:
                break
            x = torch.where(((missed <= bound) | ~missed.isfinite())[:, None], x, new)
        chain.states[i].copy_(best)
        return least.double().cpu()

    def _report(self, done: int, residual: Tensor) -> bool:
        if self.task.report is not None:
            chain = self.chain
            info = InversionInfo(
                round=self.stats.rounds,
                max_rounds=self.limit,
                num_steps=self.schedule.num_steps,
                front=torch.full((chain.batch,), done),
                residual=residual,
                tolerance=SAFETY * self.task.tol,
                _sample=lambda: read_out(self.work)[0],
            )
            self.asked = self.task.report(info) is True
        self.stopped = self.asked or self.stopped or self.stats.rounds >= self.limit
        return self.stopped
