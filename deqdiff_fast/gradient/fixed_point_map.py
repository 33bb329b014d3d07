"""One plain-torch round as a map on trajectories, for the gradient modes that run an iteration of their own."""

from __future__ import annotations

import torch
from torch import Tensor

from .._types import Generators
from ..engine.system import System
from ..schedule.noise import discard_draws, fill_drift
from .base import Problem


class FixedPointMap:
    """f(Z) = the solution of the chain whose predictions are linear around Z, E(Z) + c (X - Z), c the scalar slope.

    Its fixed point is the chain (Lim et al. 2024, arXiv 2309.12252); states are (T + 1, B, D), row 0 the noise.
    """

    def __init__(self, problem: Problem) -> None:
        schedule = problem.system.schedule
        self.init_trajectory = problem.init_trajectory
        self.drift = draw_drift(problem.system, problem.generator)
        self.state_coef, self.model_coef = schedule.state_coef.tolist(), schedule.model_coef.tolist()
        self.slope, self.lags = schedule.slope().tolist(), schedule.lags

    def scan(self, noise: Tensor, states: Tensor, predictions: Tensor) -> Tensor:
        """The next states from those (T + 1, B, D) at which the predictions (T, B, D) were made; differentiable."""
        new, outs = [noise], []
        for i in range(len(predictions)):
            outs.append(predictions[i] + self.slope[i] * (new[i] - states[i]))
            x = self.drift[i].to(noise.dtype) if self.drift is not None else torch.zeros_like(noise)
            for lag in range(min(self.lags, i + 1)):
                x = x + self.state_coef[i][lag] * new[i - lag] + self.model_coef[i][lag] * outs[i - lag]
            new.append(x)
        return torch.stack(new)

    def initial_states(self, noise: Tensor) -> Tensor:
        """(T + 1, B, D): the given trajectory with this noise (B, D) as row 0, or the chain of unit Gaussian data,
        whose model is linear."""
        if self.init_trajectory is None:
            zeros = noise.new_zeros(len(self.slope) + 1, *noise.shape)
            return self.scan(noise, zeros, zeros[1:])
        rest = self.init_trajectory[1:].detach().flatten(2).to(noise.device, noise.dtype)
        return torch.cat([noise[None], rest])


def draw_drift(system: System, generator: Generators) -> Tensor | None:
    """(T, B, D): the chain's noise times its coefficients; None for a deterministic chain."""
    shape, dtype = (system.batch, *system.shape), system.model_dtype
    if not system.schedule.stochastic:
        discard_draws(system.schedule, shape, generator, dtype, system.device)
        return None
    drift = torch.empty(system.num_steps, system.batch, system.numel, dtype=system.dtype, device=system.device)
    fill_drift(drift, system.schedule, shape, generator, dtype)
    return drift
