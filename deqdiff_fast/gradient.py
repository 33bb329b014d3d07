"""Gradients through a solved chain without storing the solve: the adjoint is the same kind of system, run backwards.

With the loss L(x_T) and J_i the Jacobian of prediction i, for one-step schedules (L = 1)

    lambda_T = dL/dx_T,    lambda_i = a_i lambda_{i+1} + b_i J_i^T lambda_{i+1}

(implicit differentiation, Bai et al. 2019, arXiv 1909.01377, of the system of Pokle et al. 2022, arXiv 2210.12867). In
chain order from the sample to the noise this is a `Schedule` whose model is the vector-Jacobian product, so the sampler
that solved the chain solves its adjoint too. Multistep schedules take the same recursion one step at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from .schedule import Schedule
from .solution import Solution
from .system import System

Solve = Callable[[Any, Schedule, Tensor, dict[str, Any]], Tensor]
PARAMETER_ROWS = 64  # rows in one call of the pass that collects parameter gradients: its activations are stored


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


def differentiable(
    system: System, solve: Callable[[], Solution], adjoint: Solve, noise: Tensor, parameters: list[Tensor]
) -> Solution:
    """Run `solve` and attach its exact gradient with respect to noise, model parameters and tensors in model_kwargs."""
    leaves, structure = tree_flatten(system.model_kwargs)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
    held: list[Solution] = []
    attach: Callable[..., Tensor] = _Attach.apply
    sample = attach(system, solve, adjoint, (leaves, structure), held, len(tensors), noise, *tensors, *parameters)
    solution = held[0]
    solution.sample = sample
    return solution


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        system: System,
        solve: Any,
        adjoint: Any,
        kwargs: Any,
        held: Any,
        count: int,
        noise: Tensor,
        *leaves: Tensor,
    ) -> Tensor:
        solution = solve()
        held.append(solution)
        ctx.system, ctx.adjoint, ctx.kwargs, ctx.count = system, adjoint, kwargs, count
        ctx.save_for_backward(solution.trajectory, *leaves)
        sample: Tensor = solution.sample.clone()
        return sample

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        trajectory, *leaves = ctx.saved_tensors
        system: System = ctx.system
        steps, batch = system.num_steps, system.batch
        states = trajectory.reshape(steps + 1, batch, -1).to(system.dtype)
        inputs = _Rows(system, states, ctx.kwargs, leaves[: ctx.count])
        start = grad.reshape(batch, -1).to(system.dtype)
        if system.schedule.lags == 1:
            lam = _solve_adjoint(system, inputs, start, ctx.adjoint, grad.dtype)
            weights = system.model_coef.to(system.dtype)[:, 0, None, None] * lam[1:]
        else:
            lam, weights = _serial_adjoint(system, inputs, start)
        wanted = [leaf for leaf, needed in zip(leaves, ctx.needs_input_grad[7:]) if needed]
        found = iter(_collect(system, inputs, weights, wanted) if wanted else [])
        grads = [next(found) if needed else None for needed in ctx.needs_input_grad[7:]]
        return (*[None] * 6, lam[0].view(batch, *system.shape).to(grad.dtype), *grads)


class _Rows:
    """The stored trajectory as rows to differentiate at."""

    def __init__(self, system: System, states: Tensor, kwargs: Any, tensors: list[Tensor]) -> None:
        self.system, self.states = system, states
        leaves, structure = kwargs
        given = iter(tensors)
        filled = [next(given) if isinstance(x, Tensor) and x.requires_grad else x for x in leaves]
        self.kwargs = tree_unflatten(filled, structure)

    def predict(self, x: Tensor, step: Tensor, sample: Tensor) -> Tensor:
        self.system.model_kwargs = self.kwargs
        return self.system.predict(x, step, self.system.expand_kwargs(sample))

    def vjp(self, y: Tensor, step: Tensor, sample: Tensor) -> Tensor:
        """J^T y of the prediction at the stored states: y: (n, D)."""
        with torch.enable_grad():
            x = self.states[step, sample].requires_grad_(True)
            (out,) = torch.autograd.grad(self.predict(x, step, sample), x, y.to(self.system.dtype), allow_unused=True)
        return torch.zeros_like(y) if out is None else out


def _solve_adjoint(system: System, rows: _Rows, start: Tensor, adjoint: Solve, dtype: torch.dtype) -> Tensor:
    """(T + 1, B, D): lambda, index i of the forward chain, by the parallel solver."""

    def model(y: Tensor, step: Tensor, sample: Tensor) -> Tensor:
        return rows.vjp(y.flatten(1), step, sample).view_as(y).to(y.dtype)

    # gradients of mean losses are tiny, and the solver's sanity checks think in units of one
    scale = start.norm(dim=1, keepdim=True).clamp_min(torch.finfo(system.dtype).tiny) / system.numel**0.5
    who = torch.arange(system.batch, device=system.device)
    lam: Tensor = adjoint(model, adjoint_schedule(system.schedule), start / scale, {"sample": who})
    result: Tensor = lam.flip(0) * scale
    return result


def _serial_adjoint(system: System, rows: _Rows, start: Tensor) -> tuple[Tensor, Tensor]:
    """lambda (T + 1, B, D) and the cotangents of the predictions (T, B, D), one step at a time, for any lag."""
    schedule, steps = system.schedule, system.num_steps
    lam = torch.zeros_like(rows.states)
    weights = torch.zeros_like(rows.states[1:])
    lam[-1] = start
    who = torch.arange(system.batch, device=system.device)
    for i in reversed(range(steps)):
        for lag in range(min(schedule.lags, i + 1)):
            lam[i - lag] += float(schedule.state_coef[i, lag]) * lam[i + 1]
            weights[i - lag] += float(schedule.model_coef[i, lag]) * lam[i + 1]
        lam[i] += rows.vjp(weights[i], torch.full_like(who, i), who)
    return lam, weights


def _collect(system: System, rows: _Rows, weights: Tensor, wanted: list[Tensor]) -> list[Tensor]:
    """sum over all rows of (d prediction / d leaf)^T weight, a chunk of rows at a time."""
    total = [torch.zeros_like(leaf) for leaf in wanted]
    count, size = system.num_steps * system.batch, min(PARAMETER_ROWS, system.max_batch or PARAMETER_ROWS)
    for first in range(0, count, size):
        rank = torch.arange(first, min(first + size, count), device=system.device)
        step, sample = rank // system.batch, rank % system.batch
        with torch.enable_grad():
            out = rows.predict(rows.states[step, sample], step, sample)
            grads = torch.autograd.grad(out, wanted, weights[step, sample], allow_unused=True)
        for sum_, grad in zip(total, grads):
            if grad is not None:
                sum_.add_(grad)
    return total
