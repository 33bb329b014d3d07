"""Names of solvers and gradients, and which of them go together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..gradient import NAMED
from ..gradient.implicit import Implicit
from ..gradient.phantom import Phantom
from ..gradient.reversible import Reversible
from ..gradient.unrolled import Unrolled
from .anderson import AndersonSolver
from .base import FixedPointSolver
from .relaxed import RelaxedSolver
from .reversible import ReversibleSolver

Mode = Implicit | Phantom | Unrolled | Reversible

SOLVERS: dict[str, Callable[[], FixedPointSolver]] = {
    "anderson": AndersonSolver,
    "relaxed": RelaxedSolver,
    "reversible": ReversibleSolver,
}
GRADIENTS: dict[str, Callable[[], Any]] = {**NAMED, "phantom": lambda: Phantom(tau=0.5, steps=5)}  # of arXiv 2111.05177


def resolve(solver: Any, gradient: Any) -> tuple[FixedPointSolver, Mode]:
    """Both as objects that go together.

    Raises:
        ValueError: an unknown name, or two that do not go together.
        TypeError: neither a name nor an object of the right kind.
    """
    mode, method = _mode(gradient), _method(solver)
    if not isinstance(mode, Reversible):
        return method or AndersonSolver(), mode
    if method is not None and not isinstance(method, ReversibleSolver):
        raise ValueError(f"gradient: 'reversible' takes back steps of solver='reversible', got {solver!r}")
    if method is None or isinstance(solver, str):
        method = ReversibleSolver(mode.relaxation)
    elif isinstance(gradient, str):
        mode = Reversible(method.relaxation)
    if mode.relaxation != method.relaxation:
        raise ValueError(f"gradient: expected the solver's relaxation, {method.relaxation:g}, got {mode.relaxation:g}")
    return method, mode


def _mode(gradient: Any) -> Mode:
    if isinstance(gradient, str):
        if gradient not in GRADIENTS:
            raise ValueError(f"gradient: expected one of {', '.join(map(repr, GRADIENTS))}, got {gradient!r}")
        gradient = GRADIENTS[gradient]()
    if not isinstance(gradient, (Implicit, Phantom, Unrolled, Reversible)):
        raise TypeError(f"gradient: expected a name or an object such as dq.Phantom(tau=0.5), got {gradient!r}")
    return gradient


def _method(solver: Any) -> FixedPointSolver | None:
    if isinstance(solver, str):
        if solver not in SOLVERS:
            raise ValueError(f"solver: expected one of {', '.join(map(repr, SOLVERS))}, got {solver!r}")
        return SOLVERS[solver]()
    if solver is not None and (isinstance(solver, type) or not callable(getattr(solver, "start", None))):
        raise TypeError(f"solver: expected a name or an object such as AndersonSolver(history=5), got {solver!r}")
    return solver
