"""Phantom: the gradient of a few damped rounds taken at the solution (Geng et al. 2021, arXiv 2111.05177, section 3).

z <- (1 - tau) z + tau F(z, noise), `steps` times from the solution z*, which counts as a constant; F is the plain
round, Scan(predictions(z)), with the noise as its row 0. At the solution every Jacobian is that at z*, so nothing is
run forwards: with u_K = dL/dz after the last step,

    noise += tau (dF/dnoise)^T u_k,    u_{k-1} = (1 - tau) u_k + tau (dF/dz)^T u_k.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..solution import Solution
from .at_solution import differentiate_at_solution
from .base import Problem
from .batched_vjp import BatchedVJP
from .scan_adjoint import scan_adjoint


@dataclass(frozen=True)
class Phantom:
    """The gradient of a few damped rounds at the solution: a cheap direction to descend along, not an exact gradient.

    Geng et al. 2021, arXiv 2111.05177; the default is that of Pokle et al. 2022, arXiv 2210.12867. With one step the
    gradient of the noise holds no Jacobian of the model at all: it is tau times the product of the state coefficients
    times dL/dx_T. tau = 1 with T + 1 steps is exact.

    Args:
        tau: damping in (0, 1].
        steps: damped rounds, each but one with one batched vector-Jacobian product.

    Raises:
        ValueError: a setting is out of its range.
    """

    tau: float = 0.1
    steps: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.tau, bool) or not isinstance(self.tau, (int, float)) or not 0 < self.tau <= 1:
            raise ValueError(f"tau: expected a number in (0, 1], got {self.tau!r}")
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"steps: expected an int >= 1, got {self.steps!r}")

    @property
    def name(self) -> str:
        return f"phantom(tau={self.tau:g}, steps={self.steps})"

    def attach(self, problem: Problem) -> Solution:
        """Solve with the sampler; backward runs the damped rounds. See `Gradient.attach`."""
        return differentiate_at_solution(problem, self._cotangents)

    def _cotangents(self, vjp: BatchedVJP, states: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        u, to_noise, to_predictions = torch.zeros_like(states), torch.zeros_like(start), torch.zeros_like(states[1:])
        u[-1] = start
        for step in range(self.steps):
            to_states, cotangent = scan_adjoint(vjp.system.schedule, u)
            to_noise += self.tau * to_states[0]
            to_predictions += self.tau * cotangent
            if step + 1 < self.steps:
                u *= 1 - self.tau
                u[:-1] += self.tau * vjp.vjp_sums(states[:-1], cotangent, [], to_states=True)[0]
        return to_noise, to_predictions
