"""Gradients that need nothing of a solve but its solution: the trajectory is stored, the rounds are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.autograd import Function

from .._devices import hidden_in_backward, hidden_settings
from ..solution import Solution
from .base import Problem
from .batched_vjp import BatchedVJP, apart
from .first_order import first_order

Cotangents = Callable[[BatchedVJP, Tensor, Tensor], tuple[Tensor, Tensor]]
"""`cotangents(vjp, states, start)`: from states (T + 1, B, D) and the sample's cotangent (B, D) those of the noise
(B, D) and of all predictions (T, B, D)."""


def differentiate_at_solution(problem: Problem, cotangents: Cotangents) -> Solution:
    """Solve, and attach a gradient that `cotangents` forms at the solution."""
    solutions: list[Solution] = []
    kwargs = problem.system.model_kwargs
    leaves = BatchedVJP(problem.system, kwargs).kwarg_leaves
    attach: Callable[..., Tensor] = _AtSolution.apply
    sample = attach(problem, cotangents, solutions, (kwargs, len(leaves)), problem.noise, *leaves, *problem.parameters)
    solution = solutions[0]
    solution.sample = sample
    return solution


class _AtSolution(Function):
    @staticmethod
    def forward(
        ctx: Any, problem: Problem, cotangents: Any, solutions: Any, kwargs: Any, noise: Tensor, *leaves: Tensor
    ) -> Tensor:
        solution = problem.solve()
        solutions.append(solution)
        ctx.settings = hidden_settings()
        ctx.system, ctx.cotangents, ctx.kwargs, ctx.noise = problem.system, cotangents, kwargs, noise
        ctx.save_for_backward(solution.trajectory, *leaves)
        sample: Tensor = solution.sample.clone()
        return sample

    @staticmethod
    @first_order
    @hidden_in_backward
    def backward(ctx: Any, grad: Tensor) -> Any:
        trajectory, *leaves = ctx.saved_tensors
        system, (kwargs, count) = ctx.system, ctx.kwargs
        leaves[:count] = apart(leaves[:count])
        vjp = BatchedVJP(system, kwargs, leaves[:count])
        states = trajectory.reshape(system.num_steps + 1, system.batch, -1).to(system.dtype)
        start = grad.reshape(system.batch, -1).to(system.dtype)
        to_noise, to_predictions = ctx.cotangents(vjp, states, start)
        needed = ctx.needs_input_grad[5:]
        wanted = [leaf for leaf, need in zip(leaves, needed) if need]
        sums = iter(vjp.vjp_sums(states, to_predictions, wanted, to_states=False)[1])
        grads = [next(sums) if need else None for need in needed]
        return (*[None] * 4, to_noise.view(system.batch, *system.shape).to(grad.dtype), *grads)
