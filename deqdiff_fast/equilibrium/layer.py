"""`equilibrium`: z = f(z) solved for each sample of a batch, and differentiated."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from .. import gradient as gradients
from ..gradient.implicit import Implicit
from ..gradient.phantom import Phantom
from ..gradient.reversible import Reversible
from ..gradient.unrolled import Unrolled
from .anderson import AndersonSolver
from .attach import attach, implicit, phantom
from .base import FixedPointSolver, FlatFunction
from .failure import OnFailure, conclude
from .info import EquilibriumInfo
from .loop import Solved, solve
from .relaxed import RelaxedSolver
from .reversal import solve_reversibly
from .reversible import ReversibleSolver
from .unrolled import start_recorded

SOLVERS: dict[str, Callable[[], FixedPointSolver]] = {
    "anderson": AndersonSolver,
    "relaxed": RelaxedSolver,
    "reversible": ReversibleSolver,
}
GRADIENTS = {**gradients.NAMED, "phantom": lambda: Phantom(tau=0.5, steps=5)}
WHAT = "equilibrium"


def equilibrium(
    f: Callable[[Tensor], Any], z0: Tensor, *, solver: str | FixedPointSolver | None = None, tol: float = 1e-4,
    max_steps: int = 50, gradient: str | Implicit | Phantom | Unrolled | Reversible = "implicit",
    on_failure: OnFailure = "warn",
) -> tuple[Tensor, EquilibriumInfo]:  # fmt: skip
    """Solve z = f(z), each sample of the batch by itself, and return f at the solution, differentiable.

    An implicit layer (deep equilibrium model, Bai et al. 2019, arXiv 1909.01377). The gradient goes to whatever `f`
    uses besides z, parameters of a module or tensors that a closure holds; no list of them is needed. z0 is a first
    guess and, with "implicit" and "phantom", has no gradient.

        z, info = dq.equilibrium(lambda z: torch.tanh(linear(z) + x), torch.zeros_like(x))

    A sample is accepted once |f(z) - z| <= tol |f(z)| and |f(z) - z| is shrinking; from then on its z stays as it is,
    and nothing of it enters another one's step. So a result does not hang on the rest of the batch, as far as f treats
    samples apart (batch normalisation does not) and gives the same answer to the same question (dropout does not).

    Args:
        f: (B, *shape) -> (B, *shape). It is called on all samples each time.
        z0: (B, *shape), floating-point.
        solver: "anderson" (`AndersonSolver`, the default), "relaxed" (`RelaxedSolver`), "reversible"
            (`ReversibleSolver`, the default with the reversible gradient), or an object of these classes, which are in
            `deqdiff_fast.equilibrium`.
        tol: relative residual |f(z) - z| / |f(z)| (L2) of a sample that has converged.
        max_steps: steps before giving up, >= 1. One is an evaluation of f; two of them with "reversible".
        gradient: "implicit", the adjoint equilibrium u = dL/dz + J^T u, by the same solver to the same tolerance
            (`Implicit(tol=...)`: to another); "phantom", of a few damped steps (`Phantom(tau=0.5, steps=5)`);
            "unrolled", through all steps, memory grows with them; "reversible", the exact gradient of the reversible
            iteration in memory that does not grow with its steps.
        on_failure: where a sample has not converged, in the adjoint too, "warn" (`ConvergenceWarning`), "raise", or
            "ignore": `info` alone says so, for layers with a fixed number of steps.

    Returns:
        z: (B, *shape), f at the accepted points; that of a sample that has not converged is the best known.
        info: `EquilibriumInfo`, with the residual trace, steps and convergence of each sample.

    Raises:
        ValueError: a bad argument, by its name.
        NonFiniteError: NaN or Inf; `step` and `sample` say where.
        ModelOutputError: f returned something of another shape.
        NotConvergedError: `on_failure="raise"`; its `solution` is (z, info).
    """
    method, mode = _resolve(solver, gradient)
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
        adjoint_tol = mode.tol if isinstance(mode, Implicit) and mode.tol is not None else tol
        rounding = torch.finfo(flat.own_dtype).eps
        z = attach(
            flat, found.z.to(flat.work_dtype),
            phantom(mode) if isinstance(mode, Phantom)
            else implicit(method, adjoint_tol, max_steps, on_failure, info, rounding),
        ).to(z0.dtype)  # fmt: skip
        info.evaluations = flat.calls
    conclude(found.trace, tol, on_failure, WHAT, method.name, (z, info))
    return z, info


def _info(found: Solved, f: FlatFunction, method: FixedPointSolver, mode: Any) -> EquilibriumInfo:
    point = found.z.detach().to(f.dtype).view(f.shape)
    return EquilibriumInfo(**vars(found.trace), evaluations=f.calls, solver=method.name, gradient=mode.name,
                           _f=f.f, _z=point)  # fmt: skip


def _resolve(solver: Any, gradient: Any) -> tuple[FixedPointSolver, Any]:
    """Both as objects that go together."""
    if isinstance(gradient, str):
        if gradient not in GRADIENTS:
            raise ValueError(f"gradient: expected one of {', '.join(map(repr, GRADIENTS))}, got {gradient!r}")
        mode = GRADIENTS[gradient]()
        named = True
    else:
        mode, named = gradient, False
        if not isinstance(mode, (Implicit, Phantom, Unrolled, Reversible)):
            raise TypeError(f"gradient: expected a name or an object such as dq.Phantom(tau=0.5), got {gradient!r}")
    if solver is None:
        method = ReversibleSolver(mode.relaxation) if isinstance(mode, Reversible) else AndersonSolver()
    elif isinstance(solver, str):
        if solver not in SOLVERS:
            raise ValueError(f"solver: expected one of {', '.join(map(repr, SOLVERS))}, got {solver!r}")
        method = SOLVERS[solver]()
    elif isinstance(solver, type) or not callable(getattr(solver, "start", None)):
        raise TypeError(f"solver: expected a name or an object such as AndersonSolver(history=5), got {solver!r}")
    else:
        method = solver
    if isinstance(mode, Reversible):
        if not isinstance(method, ReversibleSolver):
            raise ValueError(f"gradient: 'reversible' takes back steps of solver='reversible', got {solver!r}")
        if named or isinstance(solver, str):
            mode = Reversible(method.relaxation) if named else mode
            method = ReversibleSolver(mode.relaxation)
        if mode.relaxation != method.relaxation:
            raise ValueError(
                f"gradient: expected the solver's relaxation, {method.relaxation:g}, got {mode.relaxation:g}"
            )
    return method, mode


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
