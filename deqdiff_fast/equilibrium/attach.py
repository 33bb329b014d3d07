"""Gradients that need nothing of a solve but its solution: f is evaluated there once more, with its graph.

That graph leads to whatever f closes over, parameters or inputs, and no list of them is needed. With u the cotangent
that the graph is given in the place of g = dL/dz, the gradient of a parameter p is (df/dp)^T u, and u is

    implicit:  u = g + J^T u                                               (Bai et al. 2019, arXiv 1909.01377, thm. 1)
    phantom:   u = tau sum_k v_k, v_0 = g, v_k = (1 - tau) v_k-1 + tau J^T v_k-1   (Geng et al. 2021, arXiv 2111.05177)

with J = df/dz at the solution.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..gradient.phantom import Phantom
from .base import FixedPointSolver, FlatFunction
from .failure import OnFailure, conclude
from .info import EquilibriumInfo
from .loop import solve

Cotangent = Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]
"""`cotangent(g, vjp)` -> u, all (B, D); vjp(u) = J^T u."""


def attach(f: FlatFunction, z: Tensor, cotangent: Cotangent) -> Tensor:
    """f(z), (B, *shape), from z: (B, D), with that gradient. Without a grad_fn where f depends on nothing else."""
    with torch.enable_grad():
        point = z.detach().requires_grad_()
        out = f(point)
    if not leads_beyond(out, point):
        return out.detach().view(f.shape)

    def vjp(u: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(out, point, u, retain_graph=True, allow_unused=True)
        return torch.zeros_like(u) if found is None else found

    def whole(grad: Tensor) -> Tensor:
        grad = grad.reshape(out.shape)
        # overflow of a scaled loss: for GradScaler to see, which then leaves this step out
        return cotangent(grad, vjp) if bool(grad.isfinite().all()) else grad

    attached: Callable[..., Tensor] = _AtSolution.apply
    return attached(out, whole).view(f.shape)


def leads_beyond(out: Tensor, point: Tensor) -> bool:
    """Whether the graph of `out` ends at any other leaf than `point`: at something that wants a gradient."""
    left, seen = [out.grad_fn], set()
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and leaf is not point:
            return True
        left += [following for following, _ in node.next_functions]
    return False


class _AtSolution(Function):
    """The identity, whose cotangent is the adjoint's solution."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, cotangent: Any) -> Tensor:
        ctx.cotangent = cotangent
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError(
                "gradient: expected to be differentiated once, this mode is once_differentiable; for second "
                "derivatives use gradient='unrolled'"
            )
        return ctx.cotangent(grad), None


@dataclass
class Adjoint:
    """The adjoint equilibrium, found by the solver that found z. Leaves its trace in `info`."""

    solver: FixedPointSolver
    tol: float
    max_steps: int
    on_failure: OnFailure
    info: EquilibriumInfo
    f: FlatFunction

    def __call__(self, grad: Tensor, vjp: Callable[[Tensor], Tensor]) -> Tensor:
        what, unit = "the adjoint of equilibrium", torch.finfo(self.f.own_dtype).eps
        # gradients of mean losses are tiny: squares of them may vanish
        scale = grad.abs().amax(1, keepdim=True)
        scale = torch.where(scale > 0, scale, 1.0)
        first = grad / scale
        found = solve(lambda u: first + vjp(u), self.solver.start(first), self.tol, self.max_steps, what, unit)
        self.info.adjoint = found.trace
        u = found.value * scale
        conclude(found.trace, self.tol, self.on_failure, what, self.solver.name, (u, self.info))
        return u


def phantom(settings: Phantom) -> Cotangent:
    """A few damped steps at the solution."""

    def cotangent(grad: Tensor, vjp: Callable[[Tensor], Tensor]) -> Tensor:
        v, total = grad, settings.tau * grad
        for _ in range(settings.steps - 1):
            v = torch.lerp(v, vjp(v), settings.tau)
            total = total + settings.tau * v
        return total

    return cotangent
