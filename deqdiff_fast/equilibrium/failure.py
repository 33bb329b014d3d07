"""What happens where samples have not converged."""

from __future__ import annotations

import warnings
from typing import Literal

from ..errors import ConvergenceWarning, NotConvergedError
from .info import SolveTrace

OnFailure = Literal["warn", "raise", "ignore"]


def conclude(trace: SolveTrace, tol: float, on_failure: OnFailure, what: str, solver: str, solution: object) -> None:
    """Warn, raise or nothing, as `on_failure` says, where a sample has not converged.

    Raises:
        NotConvergedError: with `solution`.
    """
    if on_failure == "ignore" or bool(trace.converged.all()):
        return
    bad = (~trace.converged).nonzero()[:, 0]
    worst = int(bad[trace.residual[bad].argmax()])
    message = (
        f"{what}: {len(bad)} of {len(trace.converged)} samples not converged after {len(trace.residual_trace)} steps "
        f"of {solver}; the largest residual is {float(trace.residual[worst]):.1e} (sample {worst}), tol {tol:g}. Raise "
        "max_steps or tol, or make f more of a contraction"
    )
    if on_failure == "raise":
        raise NotConvergedError(message, solution)
    warnings.warn(message, ConvergenceWarning, stacklevel=3)
