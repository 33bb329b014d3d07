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
from .base import Adjoint, Problem
from .equilibrium import at_equilibrium
from .rows import Rows


@dataclass(frozen=True)
class Implicit:
    """Exact to a tolerance, in the memory of one trajectory, whatever the rounds were.

    tol: relative error allowed in the gradient at the solution found (None: the sampler's `tol`, and 1e-4 at most). A
    descent gets along with 1e-2, which takes fewer vector-Jacobian products. One step at a time there is none.
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
        serial = problem.system.schedule.lags > 1

        def solve() -> Solution:
            nonlocal serial
            solution = problem.solve()
            serial = serial or solution.stats.stop_reason == "serial"
            return solution

        def cotangents(rows: Rows, states: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
            if serial:
                return _serial(rows, states, start)
            return _parallel(rows, states, start, problem.adjoint, self.tol)

        return at_equilibrium(replace(problem, solve=solve), cotangents)


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


def _parallel(rows: Rows, states: Tensor, start: Tensor, adjoint: Adjoint, tol: float | None) -> tuple[Tensor, Tensor]:
    """The recursion of a one-step schedule, by the parallel solver."""
    system = rows.system

    def model(y: Tensor, step: Tensor, sample: Tensor) -> Tensor:
        return rows.vjp(states[step, sample], step, sample, y.flatten(1)).view_as(y)

    # gradients of mean losses are tiny, and the solver's sanity checks think in units of one
    scale = start.norm(dim=1, keepdim=True).clamp_min(torch.finfo(system.dtype).tiny) / system.numel**0.5
    who = torch.arange(system.batch, device=system.device)
    lam = adjoint(model, adjoint_schedule(system.schedule), start / scale, {"sample": who}, tol).flip(0) * scale
    weights: Tensor = system.model_coef.to(system.dtype)[:, 0, None, None] * lam[1:]
    return lam[0], weights


def _serial(rows: Rows, states: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """The recursion one step at a time, for any lag."""
    system, schedule = rows.system, rows.system.schedule
    lam, weights = torch.zeros_like(states), torch.zeros_like(states[1:])
    lam[-1] = start
    who = torch.arange(system.batch, device=system.device)
    for i in reversed(range(system.num_steps)):
        for lag in range(min(schedule.lags, i + 1)):
            lam[i - lag] += float(schedule.state_coef[i, lag]) * lam[i + 1]
            weights[i - lag] += float(schedule.model_coef[i, lag]) * lam[i + 1]
        lam[i] += rows.vjp(states[i], torch.full_like(who, i), who, weights[i])
    return lam[0], weights
