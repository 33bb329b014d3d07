"""Solvers of triangular fixed-point systems. They see a chain of affine steps and predictions, not diffusion."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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


def resolve(solver: str | Solver | Any) -> Solver:
    """A solver object from a name or an object. Raises ValueError with the known names, TypeError for anything else."""
    if isinstance(solver, str):
        if solver not in NAMED:
            raise ValueError(
                f"solver: expected one of {', '.join(map(repr, NAMED))} or a solver object, got {solver!r}"
            )
        return NAMED[solver]()
    if not isinstance(solver, Solver):
        got = solver.__name__ if isinstance(solver, type) else type(solver).__name__
        raise TypeError(
            f"solver: expected a name or an object of a class derived from deqdiff_fast.solver.Solver, got {got}; see "
            "'Extending' in the documentation"
        )
    return solver


__all__ = ["NAMED", "Anderson", "Drafted", "Paradigms", "Parareal", "Picard", "QuasiNewton", "Solver", "resolve"]
