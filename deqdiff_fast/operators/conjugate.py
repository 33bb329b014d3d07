"""Pseudo-inverses by conjugate gradients, for operators without a decomposition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Map = Callable[[Tensor], Tensor]


def least_squares(
    forward: Map, adjoint: Map, y: Tensor, *, damping: Tensor | float = 0.0, tol: float = 1e-6, max_steps: int = 200
) -> Tensor:
    """The x of smallest ||A x - y||^2 + damping ||x||^2, and of these the smallest: conjugate gradients (CGLS).

    Hestenes and Stiefel, 1952; Bjorck, "Numerical Methods for Least Squares Problems", 1996, algorithm 7.4.1. Rows do
    not know each other: one that has reached its tolerance stays as it is. Reads a number on the host in every step.

    Args:
        forward: A, (B, ...) -> (B, ...).
        adjoint: its transpose.
        y: (B, ...).
        damping: >= 0, a number or one for each row (B,).
        tol: a row ends where the gradient's norm is at most this times what it was.
        max_steps: a row that has not ended by then is returned as it is.

    Returns:
        x of the shape of `adjoint(y)`; its gradient with respect to y is the transposed problem's solution.
    """
    solution: Tensor = _LeastSquares.apply(y, forward, adjoint, damping, tol, max_steps)  # type: ignore[no-untyped-call]
    return solution


class _LeastSquares(torch.autograd.Function):
    """(A^T A + d)^-1 A^T y is linear in y; its transpose is A (A^T A + d)^-1 g = (A A^T + d)^-1 A g."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, forward: Map, adjoint: Map, damping: Tensor | float, tol: float, max_steps: int
    ) -> Tensor:
        ctx.problem = forward, adjoint, damping, tol, max_steps
        return _cgls(forward, adjoint, y.detach(), damping, tol, max_steps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        forward, adjoint, damping, tol, max_steps = ctx.problem
        solution = _LeastSquares.apply(grads[0], adjoint, forward, damping, tol, max_steps)  # type: ignore[no-untyped-call]
        return (solution, *[None] * 5)


def _cgls(forward: Map, adjoint: Map, y: Tensor, damping: Tensor | float, tol: float, max_steps: int) -> Tensor:
    residual = y.clone()
    gradient = adjoint(residual)
    solution, direction = torch.zeros_like(gradient), gradient.clone()
    energy = _squares(gradient)  # (B,)
    enough = tol**2 * energy
    damping = torch.as_tensor(damping, dtype=energy.dtype, device=energy.device)
    # steps along a gradient that is rounding of the residual grow without bound; largest: of ||A v||^2 / ||v||^2
    largest, rounding = torch.zeros_like(energy), (2 * torch.finfo(energy.dtype).eps) ** 2
    for _ in range(max_steps):
        active = energy > enough
        if not bool(active.any()):
            break
        image = forward(direction)
        size, curvature = _squares(direction), _squares(image)
        largest = torch.maximum(largest, curvature / size.where(size > 0, size.new_ones(())))
        energy = torch.where(energy > rounding * largest * _squares(residual), energy, 0)
        active, curvature = active & (energy > 0), curvature + damping * size
        step = torch.where(active & (curvature > 0), energy / curvature.where(curvature > 0, energy.new_ones(())), 0)
        solution = solution + _rows(step, solution) * direction
        residual = residual - _rows(step, residual) * image
        gradient = adjoint(residual) - _rows(damping, solution) * solution
        fresh = _squares(gradient)
        ratio = torch.where(active & (energy > 0), fresh / energy.where(energy > 0, energy.new_ones(())), 0)
        direction = gradient + _rows(ratio, direction) * direction
        energy = torch.where(active, fresh, energy)
    return solution


def _squares(x: Tensor) -> Tensor:
    return x.flatten(1).square().sum(1)


def _rows(factor: Tensor, like: Tensor) -> Tensor:
    return factor.reshape(-1, *[1] * (like.dim() - 1))


__all__ = ["least_squares"]
