"""The loop of inversion by gradient descent: evaluate, step, and leave out the images that are done."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim import Optimizer

from .._devices import float64
from ..errors import NonFiniteError
from .base import InversionProblem
from .forward_pass import ForwardPass

if TYPE_CHECKING:
    from .optimise import Optimise, OptimiseStats


class GradientDescent:
    """One run: the noises that move, the best ones so far, and which images are still active.

    Args:
        forward: the differentiable chain.
        noise: (B, *shape), the initial one.
        trajectory: (T + 1, B, *shape) from that noise, if it is known.
        start_time: of the inversion, by time.perf_counter.
    """

    def __init__(
        self, method: Optimise, problem: InversionProblem, stats: OptimiseStats, forward: ForwardPass, noise: Tensor,
        trajectory: Tensor | None, start_time: float,
    ) -> None:  # fmt: skip
        self.method, self.problem, self.stats, self.forward = method, problem, stats, forward
        self.start_time = start_time
        self.noises = [row.clone().requires_grad_(True) for row in noise.detach()]
        self.best, self.trajectory = noise.detach().clone(), trajectory
        self.best_trajectory = None if trajectory is None else trajectory.clone()
        sq_size = float64(problem.in_norm(problem.image)).square().sum(1).cpu()
        self.stop = sq_size * problem.tol**2 if method.stop is None else torch.full_like(sq_size, method.stop)
        self.sq_size = sq_size.clamp_min(torch.finfo(torch.float64).tiny)
        self.least = torch.full_like(sq_size, math.inf)
        self.active = torch.arange(problem.batch)
        self.losses: list[Tensor] = []
        self.seconds: list[float] = []
        self.stopped = False

    def run(self) -> Tensor:
        """(B,) whether the loss got to where the image counts as done."""
        optimizer, limit = self.method.make_optimizer(self.noises), self.problem.max_rounds or math.inf
        while not (self.stopped or len(self.active) == 0):
            if self.stats.steps >= self.method.steps or self.stats.rounds >= limit:
                self.stats.stop_reason = "max_rounds"
                break
            try:
                optimizer.step(lambda: self.evaluate(optimizer))
            except NonFiniteError as error:
                if not self.losses:  # the initial noise is at fault, or the model
                    raise
                self.stats.notes.append(f"the descent left the model's range: {error}")
                self.stats.stop_reason = "diverged"
                break
            self.stats.steps += 1
            left = self.active[(self.least > self.stop)[self.active]]
            finite = torch.tensor([bool(self.noises[b].detach().isfinite().all()) for b in left.tolist()])
            if not bool(finite.all()):
                self.stats.notes.append("the optimizer made noise that is not finite; those images stopped early")
            self.active = left[finite.bool()]
        return self.least <= self.stop

    def evaluate(self, optimizer: Optimizer) -> float:
        """The loss of the active images, with their gradients in place."""
        optimizer.zero_grad(set_to_none=True)
        samples = self.active
        at = samples.to(self.problem.image.device)
        moved = [self.noises[b] for b in samples.tolist()]
        noise = torch.stack(moved)
        warm = self.trajectory if self.method.warm_start else None
        sample, trajectory, rounds = self.forward(noise, at, None if warm is None else warm[:, at])
        wide = torch.promote_types(sample.dtype, torch.float32)
        loss = self.problem.in_norm(sample.to(wide) - self.problem.image[at].to(wide)).square().sum(1)
        torch.autograd.backward(loss.sum(), inputs=moved)  # nothing of the caller's gets one
        self._record(samples, noise.detach(), trajectory, loss.detach().cpu().double(), rounds)
        return float(loss.detach().sum())

    def _record(self, samples: Tensor, noise: Tensor, trajectory: Tensor, loss: Tensor, rounds: int) -> None:
        """Take note of an evaluation, and report it."""
        at = samples.to(noise.device)
        if self.trajectory is None:
            self.trajectory = trajectory.new_zeros(len(trajectory), self.problem.batch, *trajectory.shape[2:])
            self.best_trajectory = self.trajectory.clone()
        assert self.best_trajectory is not None
        self.trajectory[:, at] = trajectory
        better = loss < self.least[samples]  # never where the loss is NaN
        self.best[at[better]] = noise[better]
        self.best_trajectory[:, at[better]] = trajectory[:, better]
        self.least[samples[better]] = loss[better]
        last = self.losses[-1].clone() if self.losses else torch.full_like(self.least, math.inf)
        last[samples] = loss
        self.losses.append(last)
        self.seconds.append(time.perf_counter() - self.start_time)
        self.stats.rounds += rounds
        steps = self.problem.schedule.num_steps
        self.stopped = self.problem.notify(
            self.stats.rounds, self.problem.max_rounds or self.method.steps * steps,
            (self.least <= self.stop).long() * steps, (self.least / self.sq_size).sqrt(),
            float((self.stop / self.sq_size).sqrt().min()), lambda: self.best.clone(),
        )  # fmt: skip
        if self.stopped:
            self.stats.stop_reason = "callback"
