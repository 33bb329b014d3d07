"""Every exception and warning that the library raises on purpose."""

from __future__ import annotations

from functools import partial
from typing import Any


class DeqDiffError(Exception):
    """Base class: `except deqdiff_fast.DeqDiffError` catches all of the library's own errors."""


class ModelOutputError(DeqDiffError, ValueError):
    """The model returned something that is not a prediction: wrong shape, wrong dtype or wrong device."""


class NonFiniteError(DeqDiffError, FloatingPointError):
    """NaN or Inf appeared. `timestep`, `step` (chain index) and `round` say where; `sample` which of the batch."""

    def __init__(self, message: str, *, step: int, timestep: float, round: int, sample: int) -> None:
        super().__init__(message)
        self.step, self.timestep, self.round, self.sample = step, timestep, round, sample

    def __reduce__(self) -> tuple[Any, ...]:
        at = {name: getattr(self, name) for name in ("step", "timestep", "round", "sample")}
        return partial(type(self), **at), self.args, vars(self)

    @classmethod
    def at_step(
        cls, what: str, *, step: int, num_steps: int, timestep: float, round: int, sample: int
    ) -> NonFiniteError:
        """The error with its standard message. what: what happened, say "the model returned NaN or Inf"."""
        message = (
            f"{what} at timestep {timestep:g} (step {step} of {num_steps}) in round {round}, sample {sample}; check "
            "the model's inputs and dtype, and that the schedule's prediction_type is the model's"
        )
        return cls(message, step=step, timestep=timestep, round=round, sample=sample)


class NotConvergedError(DeqDiffError, RuntimeError):
    """The solve used up its rounds and `on_failure="raise"`. `solution` holds the best iterate."""

    def __init__(self, message: str, solution: object = None) -> None:
        super().__init__(message)
        self.solution = solution


class RankError(DeqDiffError, RuntimeError):
    """Something went wrong on one of several ranks; raised on all of them.

    `rank` says on which (-1 where that is not one), `timestep` and `round` where, as far as that is known.
    """

    def __init__(
        self, message: str, *, rank: int = -1, timestep: float | None = None, round: int | None = None
    ) -> None:
        super().__init__(message)
        self.rank, self.timestep, self.round = rank, timestep, round

    def __str__(self) -> str:
        return f"{self.args[0]}{f' (round {self.round})' if self.round else ''}"

    def __reduce__(self) -> tuple[Any, ...]:
        at = {name: getattr(self, name) for name in ("rank", "timestep", "round")}
        return partial(type(self), **at), self.args, vars(self)


class DamagedPairsError(DeqDiffError, ValueError):
    """A file in a folder of pairs is not what was written there: cut off, altered or of another folder. `path` names
    it."""

    def __init__(self, message: str, path: str | None = None) -> None:
        super().__init__(message)
        self.path = path


class PairsMismatchError(DeqDiffError, ValueError):
    """A folder of pairs was begun with something else than is given now; `differs` lists what: the model's weights,
    the schedule, a setting."""

    def __init__(self, message: str, differs: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.differs = differs


class NotAffineError(DeqDiffError, ValueError):
    """The scheduler's step is not affine in the states and predictions, so it cannot be solved in parallel exactly."""


class BackendUnavailableError(DeqDiffError, RuntimeError):
    """A backend was asked for by name and cannot run here."""


class StaleLeaseError(DeqDiffError, RuntimeError):
    """Solver memory was used after its lease was released."""


class ConvergenceWarning(UserWarning):
    """The solve did not reach its tolerance and `on_failure="warn"`."""
