"""`equilibrium`: z = f(z) solved for each sample of a batch, and differentiated."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from ..gradient.implicit import Implicit
from ..gradient.phantom import Phantom
from ..gradient.reversible import Reversible
from ..gradient.unrolled import Unrolled
from .attach import Adjoint, attach, phantom
from .base import FixedPointSolver, FlatFunction
from .failure import OnFailure, conclude
from .info import EquilibriumInfo
from .loop import Solved, solve
from .reversal import solve_reversibly
from .reversible import ReversibleSolver
from .settings import resolve
from .unrolled import start_recorded

WHAT = "equilibrium"


def equilibrium(
    f: Callable[[Tensor], Any], z0: Tensor, *, solver: str | FixedPointSolver | None = None, tol: float = 1e-4,
    max_steps: int = 50, gradient: str | Implicit | Phantom | Unrolled | Reversible = "implicit",
    on_failure: OnFailure = "warn",
) -> tuple[Tensor, EquilibriumInfo]:  # fmt: skip
    """Solve z = f(z), each sample of the batch by itself, and return f at the solution, differentiable.

    An implicit layer (deep equilibrium model, Bai et al. 2019, arXiv 1909.01377). The gradient goes to whatever `f`
    uses besides z, parameters or tensors in a closure. z0 is a first guess and has none with "implicit" and "phantom".

        z, info = dq.equilibrium(lambda z: torch.tanh(linear(z) + x), torch.zeros_like(x))

    A sample is accepted once |f(z) - z| <= tol |f(z)|, unless a secant says that it is still far away; its z then stays
    as it is. So a result does not hang on the rest of the batch, as far as f treats samples apart (batch normalisation
    does not) and gives the same answer to the same question (dropout does not).

    Args:
        f: (B, *shape) -> (B, *shape). It is called on all samples each time.
        z0: (B, *shape), floating-point.
        solver: "anderson" (the default), "relaxed", "reversible" (that of the reversible gradient), or an object with
            settings: `AndersonSolver`, `RelaxedSolver`, `ReversibleSolver` of `deqdiff_fast.equilibrium`.
        tol: relative residual |f(z) - z| / |f(z)| (L2) of a sample that has converged.
        max_steps: steps before giving up, >= 1. One is an evaluation of f; two of them with "reversible".
        gradient: "implicit", the adjoint equilibrium, by the same solver to the same tolerance (or `Implicit(tol)`);
            "phantom", a few damped steps, `Phantom(tau=0.5, steps=5)`; "unrolled", through all steps, memory grows;
            "reversible", exact for the reversible iteration in memory that does not grow.
        on_failure: where a sample has not converged, in the adjoint too: "warn" (`ConvergenceWarning`), "raise", or
            "ignore", for layers with a fixed number of steps: `info` alone says so.

    Returns:
        z: (B, *shape), f at the accepted points; that of a sample that has not converged is the best known.
        info: `EquilibriumInfo`: residual trace, steps, convergence of each sample.

    Raises:
        ValueError: a bad argument, by its name.
        NonFiniteError: NaN or Inf; `step` and `sample` say where.
        ModelOutputError: f returned something of another shape.
        NotConvergedError: `on_failure="raise"`; its `solution` is (z, info).
    """
    method, mode = resolve(solver, gradient)
    _check(f, z0, tol, max_steps, on_failure)
    flat = FlatFunction(f, z0)
    start = z0.reshape(len(z0), -1).to(flat.work_dtype)
    recorded = torch.is_grad_enabled()
    if recorded and isinstance(mode, Unrolled):
        found = solve(flat, start_recorded(method, start), tol, max_steps, WHAT)
    elif recorded and isinstance(mode, Reversible):
        found = solve_reversibly(flat, start, cast(ReversibleSolver, method), tol, max_steps, WHAT)
    else:
        with torch.no_grad():
            found = solve(flat, method.start(start), tol, max_steps, WHAT)
    info = _info(found, flat, method, mode)
    z = found.value.view(z0.shape).to(z0.dtype)
    if recorded and isinstance(mode, (Implicit, Phantom)):
        adjoint = Adjoint(method, getattr(mode, "tol", None) or tol, max_steps, on_failure, info, flat)
        cotangent = phantom(mode) if isinstance(mode, Phantom) else adjoint
        z = attach(flat, found.z.to(flat.work_dtype), cotangent).to(z0.dtype)
        info.evaluations = flat.calls
    conclude(found.trace, tol, on_failure, WHAT, method.name, (z, info))
    return z, info


def _info(found: Solved, f: FlatFunction, method: FixedPointSolver, mode: Any) -> EquilibriumInfo:
    point = found.z.detach().to(f.dtype).view(f.shape)
    return EquilibriumInfo(**vars(found.trace), evaluations=f.calls, solver=method.name, gradient=mode.name,
                           _f=f.f, _z=point)  # fmt: skip


def _check(f: Any, z0: Any, tol: Any, max_steps: Any, on_failure: Any) -> None:
    if not callable(f):
        raise TypeError(f"f: expected a function of z, got {type(f).__name__}")
    if not isinstance(z0, Tensor) or not z0.is_floating_point() or z0.dim() < 1 or not len(z0):
        got = f"{tuple(z0.shape)} {z0.dtype}" if isinstance(z0, Tensor) else type(z0).__name__
        raise ValueError(f"z0: expected a floating-point tensor (B, *shape) with B >= 1, got {got}")
    if isinstance(tol, bool) or not isinstance(tol, (int, float)) or not 0 < tol < math.inf:
        raise ValueError(f"tol: expected a number > 0, got {tol!r}")
    if isinstance(max_steps, bool) or not isinstance(max_steps, int) or max_steps < 1:
        raise ValueError(f"max_steps: expected an int >= 1, got {max_steps!r}")
    if on_failure not in ("warn", "raise", "ignore"):
        raise ValueError(f"on_failure: expected 'warn', 'raise' or 'ignore', got {on_failure!r}")
