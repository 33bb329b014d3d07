"""The settings with which a sampler solves the adjoint of its own chain."""

from __future__ import annotations

from typing import Any

from ..engine.options import Options
from ..solver import resolve

ADJOINT_TOL = 1e-4


def adjoint_settings(options: Options, tol: float | None) -> dict[str, Any]:
    """Keyword arguments of a `DEQSampler`; tol: None for the sampler's own, and ADJOINT_TOL at most."""
    solver = options.solver
    plain = solver.slope in ("auto", "scalar", None)  # a spectrum has the shape of an image
    # neither a draft nor a solver that makes its own rounds, which may want more of a chain than an adjoint one has
    plain = plain and not solver.needs_draft and not solver.makes_rounds
    solver = solver if plain and solver.max_rounds is None else resolve("quasi-newton")
    return {
        "solver": solver.for_adjoint(),
        "tol": tol or min(ADJOINT_TOL, options.tol or ADJOINT_TOL),
        "max_batch": options.max_batch,
        "backend": options.backend,
    }
