"""Every exception and warning that the library raises on purpose."""

from __future__ import annotations


class DeqDiffError(Exception):
    """Base class: `except deqdiff_fast.DeqDiffError` catches all of the library's own errors."""


class ModelOutputError(DeqDiffError, ValueError):
    """The model returned something that is not a prediction: wrong shape, wrong dtype or wrong device."""


class NonFiniteError(DeqDiffError, FloatingPointError):
    """NaN or Inf appeared. `timestep`, `step` (chain index) and `round` say where; `sample` which of the batch."""

    def __init__(self, message: str, *, step: int, timestep: float, round: int, sample: int) -> None:
        super().__init__(message)
        self.step, self.timestep, self.round, self.sample = step, timestep, round, sample


class NotConvergedError(DeqDiffError, RuntimeError):
    """The solve used up its rounds and `on_failure="raise"`. `solution` holds the best iterate."""

    def __init__(self, message: str, solution: object = None) -> None:
        super().__init__(message)
        self.solution = solution


class NotAffineError(DeqDiffError, ValueError):
    """The scheduler's step is not affine in the states and predictions, so it cannot be solved in parallel exactly."""


class BackendUnavailableError(DeqDiffError, RuntimeError):
    """A backend was asked for by name and cannot run here."""


class StaleLeaseError(DeqDiffError, RuntimeError):
    """Solver memory was used after its lease was released."""


class ConvergenceWarning(UserWarning):
    """The solve did not reach its tolerance and `on_failure="warn"`."""
