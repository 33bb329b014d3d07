"""What every kind of solve tells its user: a progress bar, and an error or a warning where it did not converge."""

from __future__ import annotations

import warnings
from typing import Any, Protocol

from torch import Tensor
from tqdm.auto import tqdm

from .._types import OnFailure
from ..errors import ConvergenceWarning, NotConvergedError


class ProgressBar:
    """A tqdm bar, or nothing where none is wanted; a context manager, so that it is closed whatever happens."""

    def __init__(self, wanted: bool, description: str, unit: str, total: int | None = None) -> None:
        self.bar: Any = tqdm(total=total, unit=unit, desc=description) if wanted else None

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def show(self, done: int, residual: Tensor, total: int | None = None, **fields: object) -> None:
        """Move the bar to `done` units. total: new length, if given. fields: shown beside the largest residual."""
        if self.bar is None:
            return
        self.bar.total = self.bar.total if total is None else total
        self.bar.update(done - self.bar.n)
        self.bar.set_postfix(**fields, residual=f"{float(residual.max()):.1e}")


class HasConverged(Protocol):
    """What a solve returns; converged: (B,) bool."""

    converged: Tensor


def report_not_converged(
    result: HasConverged, on_failure: OnFailure, failure: str, remedy: str, stacklevel: int
) -> None:
    """Raise or warn that some samples of `result` did not converge.

    Args:
        result: attached to the error as its `solution`.
        on_failure: "raise", or "warn" for a `ConvergenceWarning`.
        failure: continues "2 of 3 ", as in "samples did not converge in 9 rounds".
        remedy: what the user can do.
        stacklevel: of the warning, counted from the caller (1: the caller itself).

    Raises:
        NotConvergedError: `on_failure` is "raise".
    """
    failed = ~result.converged
    message = f"{int(failed.sum())} of {len(failed)} {failure}; {remedy}"
    if on_failure == "raise":
        raise NotConvergedError(message, result)
    warnings.warn(message, ConvergenceWarning, stacklevel=stacklevel + 1)
