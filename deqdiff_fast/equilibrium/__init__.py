"""Implicit layers: z = f(z) for any torch function, one algorithm a file."""

from __future__ import annotations

from .anderson import AndersonSolver
from .info import EquilibriumInfo, SolveTrace
from .layer import equilibrium
from .relaxed import RelaxedSolver
from .reversible import ReversibleSolver

__all__ = ["AndersonSolver", "EquilibriumInfo", "RelaxedSolver", "ReversibleSolver", "SolveTrace", "equilibrium"]
