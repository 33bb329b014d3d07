"""Solvers of triangular fixed-point systems. They see a chain of affine steps and predictions, not diffusion."""

from __future__ import annotations

from collections.abc import Callable

from ..loop.base import Solver
from .anderson import Anderson
from .draft import Drafted
from .paradigms import Paradigms
from .parareal import Parareal
from .picard import Picard
from .quasi_newton import QuasiNewton

NAMED: dict[str, Callable[[], Solver]] = {
    "auto": QuasiNewton,
    "picard": Picard,
    "anderson": lambda: Anderson(scope="timestep"),
    "triangular": Anderson,
    "deq-ddim": Anderson.deq_ddim,
    "paradigms": Paradigms,
    "parataa": Anderson.parataa,
    "parareal": Parareal,
    "quasi-newton": QuasiNewton,
    "draft": Drafted,
}


def resolve(solver: str | Solver) -> Solver:
    """A solver object from a name or an object. Raises ValueError with the known names, TypeError for anything else."""
    if isinstance(solver, str):
        if solver not in NAMED:
            raise ValueError(
                f"solver: expected one of {', '.join(map(repr, NAMED))} or a solver object, got {solver!r}"
            )
        return NAMED[solver]()
    own = ("drive",) if hasattr(solver, "drive") else ("step", "settle", "enter")
    missing = [name for name in ("plan", "start", *own) if not callable(getattr(solver, name, None))]
    if missing:
        raise TypeError(f"solver: {type(solver).__name__} is not a solver, it has no {', '.join(missing)}")
    return solver


__all__ = ["NAMED", "Anderson", "Drafted", "Paradigms", "Parareal", "Picard", "QuasiNewton", "Solver", "resolve"]
