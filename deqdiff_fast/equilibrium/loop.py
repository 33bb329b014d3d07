"""The loop of every solver: evaluate, measure, accept each sample by itself, go on with the others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Evaluate, Iteration
from .convergence import Convergence
from .info import SolveTrace


@dataclass
class Solved:
    """Where a solve ended."""

    z: Tensor
    """(B, D), the points that were accepted."""
    value: Tensor
    """(B, D), f there."""
    trace: SolveTrace


def solve(
    evaluate: Evaluate, iteration: Iteration, tol: float, max_steps: int, what: str, unit: float | None = None
) -> Solved:
    """Iterate until every sample is accepted, or `max_steps` evaluations of the residual are over.

    A sample that is accepted stays where it is, whatever the others do; one that is not ends at the best point that
    the solver remembers.

    Args:
        unit: rounding of `evaluate`, relative (None: that of its dtype).

    Raises:
        NonFiniteError: NaN or Inf.
    """
    found = Convergence(len(iteration.z), tol, what)
    while True:
        value = evaluate(iteration.z)
        sizes = iteration.record(value)
        own = getattr(evaluate, "own_dtype", value.dtype)
        found.update(sizes, iteration, value, unit or torch.finfo(own).eps)
        if found.done or found.step >= max_steps:
            break
        iteration.advance(evaluate, found.active(value.device))
    z, residual = iteration.z, found.trace[-1]
    if not found.done:
        there = found.converged.to(value.device)[:, None]
        best, at_best, ago = iteration.best()
        z, value = torch.where(there, z, best), torch.where(there, value, at_best)
        residual = torch.stack(found.trace)[found.step - 1 - ago, torch.arange(len(ago), device=ago.device)]
        residual = torch.where(found.converged, found.trace[-1], residual)
        found.steps[~found.converged] = found.step
    return Solved(z, value, SolveTrace(found.converged, found.steps, residual, torch.stack(found.trace)))
