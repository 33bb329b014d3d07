"""Implicit: the gradient of the equilibrium itself. The adjoint is the same kind of system, run backwards.

With the loss L(x_T) and J_i the Jacobian of prediction i, for one-step schedules (L = 1)

    lambda_T = dL/dx_T,    lambda_i = a_i lambda_{i+1} + b_i J_i^T lambda_{i+1}

(implicit differentiation, Bai et al. 2019, arXiv 1909.01377, of the system of Pokle et al. 2022, arXiv 2210.12867). In
chain order from the sample to the noise this is a `Schedule` whose model is the vector-Jacobian product, so the sampler
that solved the chain solves its adjoint too. Multistep schedules take the same recursion one step at a time, and so
does a chain that the sampler's planner found to be faster serially.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..schedule import Schedule
from ..solution import Solution
from .at_solution import differentiate_at_solution
from .base import Adjoint, Problem
from .batched_vjp import BatchedVJP
from .scan_adjoint import scan_adjoint


@dataclass(frozen=True)
class Implicit:
    """The exact gradient of the chain, to a tolerance, in the memory of one trajectory however many rounds there were.

    Implicit differentiation at the fixed point (Bai et al. 2019, arXiv 1909.01377, theorem 1).

    Args:
        tol: relative L2 error allowed in the gradient at the solution found (None: the sampler's `tol`, and 1e-4 at
            most). Gradient descent gets along with 1e-2, which takes fewer vector-Jacobian products. Ignored where the
            adjoint is taken one step at a time, which is exact.

    Raises:
        ValueError: `tol` is not a finite number > 0 or None.
    """

    tol: float | None = None

    def __post_init__(self) -> None:
        tol = self.tol
        if tol is not None and (isinstance(tol, bool) or not isinstance(tol, (int, float)) or not 0 < tol < math.inf):
            raise ValueError(f"tol: expected a number > 0 or None, got {tol!r}")

    @property
    def name(self) -> str:
        return "implicit"

    def attach(self, problem: Problem) -> Solution:
        """Solve with the sampler; backward solves the adjoint chain. See `Gradient.attach`."""
        serial = problem.system.schedule.lags > 1

        def solve() -> Solution:
            nonlocal serial
            solution = problem.solve()
            serial = serial or solution.stats.stop_reason == "serial"
            return solution

        def cotangents(vjp: BatchedVJP, states: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
            if serial:
                return _serial(vjp, states, start)
            return _parallel(vjp, states, start, problem.adjoint, self.tol)

        return differentiate_at_solution(replace(problem, solve=solve), cotangents)


def adjoint_schedule(schedule: Schedule) -> Schedule:
    """The chain of lambda_T ... lambda_0 for a one-step schedule; its timesteps are the forward chain's indices i."""
    slope = schedule.slope().flip(0)
    ones = torch.ones(schedule.num_steps + 1, dtype=torch.float64)
    return Schedule(
        timesteps=torch.arange(schedule.num_steps).flip(0),
        input_scale=ones[1:],
        state_coef=schedule.state_coef.flip(0),
        model_coef=schedule.model_coef.flip(0),
        noise_coef=torch.zeros_like(slope),
        signal=ones,
        sigma=ones,
        # with unit signal and sigma E[x0 | x] = x / 2, so this x0 = p x + o makes the adjoint's own slope that of J_i
        x0_coef=torch.stack([0.5 - slope, ones[1:]], dim=1),
        name=f"adjoint of {schedule.name}",
    )


def _parallel(
    vjp: BatchedVJP, states: Tensor, start: Tensor, adjoint: Adjoint, tol: float | None
) -> tuple[Tensor, Tensor]:
    """The recursion of a one-step schedule, by the parallel solver."""
    system = vjp.system

    def model(y: Tensor, step: Tensor, sample: Tensor) -> Tensor:
        return vjp.vjp(states[step, sample], step, sample, y.flatten(1)).view_as(y)

    # gradients of mean losses are tiny, and the solver's sanity checks think in units of one
    scale = start.norm(dim=1, keepdim=True).clamp_min(torch.finfo(system.dtype).tiny) / system.numel**0.5
    kwargs = {"sample": vjp.samples}
    lam = adjoint(model, adjoint_schedule(system.schedule), start / scale, kwargs, tol).flip(0) * scale
    to_predictions: Tensor = system.model_coef.to(system.dtype)[:, 0, None, None] * lam[1:]
    return lam[0], to_predictions


def _serial(vjp: BatchedVJP, states: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """The recursion one step at a time, for any number of lags."""

    def at_step(i: int, cotangent: Tensor) -> Tensor:
        return vjp.vjp(states[i], torch.full_like(vjp.samples, i), vjp.samples, cotangent)

    direct = torch.zeros_like(states)
    direct[-1] = start
    to_states, to_predictions = scan_adjoint(vjp.system.schedule, direct, at_step)
    return to_states[0], to_predictions
