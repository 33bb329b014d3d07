"""Gradients that need nothing of a solve but its solution: the trajectory is kept, the rounds are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ..solution import Solution
from .base import Problem
from .rows import Rows

Cotangents = Callable[[Rows, Tensor, Tensor], tuple[Tensor, Tensor]]
"""`cotangents(rows, states, start)`: from states (T + 1, B, D) and the sample's cotangent (B, D) those of the noise
(B, D) and of all predictions (T, B, D)."""


def at_equilibrium(problem: Problem, cotangents: Cotangents) -> Solution:
    """Run the solve and attach a gradient that `cotangents` forms at its solution."""
    held: list[Solution] = []
    given = problem.system.model_kwargs
    tensors = Rows(problem.system, given).tensors
    attach: Callable[..., Tensor] = _Attach.apply
    sample = attach(problem, cotangents, held, (given, len(tensors)), problem.noise, *tensors, *problem.parameters)
    solution = held[0]
    solution.sample = sample
    return solution


class _Attach(Function):
    @staticmethod
    def forward(
        ctx: Any, problem: Problem, cotangents: Any, held: Any, kwargs: Any, noise: Tensor, *leaves: Tensor
    ) -> Tensor:
        solution = problem.solve()
        held.append(solution)
        ctx.system, ctx.cotangents, ctx.kwargs = problem.system, cotangents, kwargs
        ctx.save_for_backward(solution.trajectory, *leaves)
        sample: Tensor = solution.sample.clone()
        return sample

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        trajectory, *leaves = ctx.saved_tensors
        system, (given, count) = ctx.system, ctx.kwargs
        rows = Rows(system, given, leaves[:count])
        states = trajectory.reshape(system.num_steps + 1, system.batch, -1).to(system.dtype)
        start = grad.reshape(system.batch, -1).to(system.dtype)
        noise, weights = ctx.cotangents(rows, states, start)
        needed = ctx.needs_input_grad[5:]
        wanted = [leaf for leaf, need in zip(leaves, needed) if need]
        found = iter(rows.pull_back(states, weights, wanted, to_states=False)[1])
        grads = [next(found) if need else None for need in needed]
        return (*[None] * 4, noise.view(system.batch, *system.shape).to(grad.dtype), *grads)
