"""What a method of restoration is given, and what it must do.

A restoring chain is the sampler's own, with another predicted clean sample at every step (see `RestoringModel`). What
the measurement decides of a state is known before any model call: it is taken out of the unknowns, so that a solver
neither looks for it nor moves it (see `Coordinates`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from .._types import FrozenNoise
from ..operators import Operator
from ..schedule import Schedule
from .levels import Levels, column


@dataclass
class Task:
    """Measurements to restore samples from.

    Attributes:
        y: the measurements (B, ...), in float32 or float64.
        sigma: (B, 1), standard deviation of their noise; or None where there is none.
        levels: of the schedule, float64 on the CPU.
    """

    operator: Operator
    schedule: Schedule
    levels: Levels
    y: Tensor
    sigma: Tensor | None

    def frozen(self, draws: Tensor | None) -> FrozenNoise | None:
        """What a sampler is to be given of draws (T, B, *shape) for every step; None for a deterministic schedule."""
        if draws is None or not self.schedule.stochastic:
            return None
        assert self.schedule.draws is not None
        return FrozenNoise(draws[self.schedule.draws.to(draws.device)])


@dataclass
class Start:
    """Where the chain of unknowns begins.

    Attributes:
        state: (B, *shape).
        draws: the frozen noise of the unknowns, None for a deterministic schedule.
        data: tensors with one row for each sample, or marked as `shared`, given to every call.
    """

    state: Tensor
    draws: FrozenNoise | None
    data: dict[str, Any] = field(default_factory=dict)


@dataclass
class Rows:
    """The rows (timestep, sample) of one model call.

    Attributes:
        step: (n,) int64, the timestep's number in the chain.
        sample: (n,) int64.
        operator: that of the rows.
        data: of the rows, see `Start.data`.
        levels: on the rows' device, in their dtype.
        vjp: v -> (d x0 / d x)^T v, row by row, where the method needs it.
        differentiated: whether what comes of it will be.
    """

    step: Tensor
    sample: Tensor
    operator: Operator
    data: dict[str, Any]
    levels: Levels
    vjp: Callable[[Tensor], Tensor] | None = None
    differentiated: bool = False

    def level(self, name: str, like: Tensor, after: int = 0) -> Tensor:
        """(n, 1, ...) of a table of `levels`, at the step or, in tables of T + 1, after it."""
        return column(getattr(self.levels, name)[self.step + after], like)


class Coordinates(Protocol):
    """What of the states is unknown: u instead of x, and w instead of the predicted clean sample x0.

    The chain from u with clean samples w is that from x with clean samples x0.
    """

    @property
    def fresh(self) -> bool:
        """Whether noise is wanted for every step, of a deterministic schedule too."""
        ...

    def begin(self, task: Task, noise: Tensor, draws: Tensor | None) -> Start:
        """The unknowns of the noise (B, *shape). draws: (T, B, *shape) standard normal for every step, or None."""
        ...

    def state(self, u: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """x of rows u: (n, *shape), and what of u it depends on; the rest is 0 along the chain."""
        ...

    def clean(self, x0: Tensor, unknown: Tensor, rows: Rows) -> Tensor:
        """w of predicted clean samples x0: (n, *shape). unknown: what of u there is to be known."""
        ...

    def finish(self, u: Tensor, task: Task, data: dict[str, Any]) -> Tensor:
        """The sample (B, *shape) from the last unknowns."""
        ...


class Method(Protocol):
    """A way to let a measurement into the chain."""

    @property
    def name(self) -> str:
        """As in messages, with all settings: equal names are equal methods."""
        ...

    needs_vjp: bool
    """Whether `restored` needs the Jacobian of the model."""

    def check(self, operator: Operator, schedule: Schedule, noisy: bool) -> None:
        """Raises ValueError where the method cannot be used for these."""
        ...

    def coordinates(self, noisy: bool) -> Coordinates:
        """Those in which the chain is solved. noisy: whether there is noise in the measurements."""
        ...

    def restored(self, x0: Tensor, x: Tensor, rows: Rows) -> Tensor:
        """The clean sample (n, *shape) that takes the place of the predicted one."""
        ...


def positive(name: str, value: float) -> None:
    """Raises ValueError unless it is a finite number > 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{name}: expected a finite number > 0, got {value!r}")


def needs_one_step(method: str, schedule: Schedule) -> None:
    """Raises ValueError for a multistep schedule."""
    if schedule.lags > 1:
        raise ValueError(
            f"schedule: expected a one-step schedule (DDIM, DDPM, Euler) for method={method!r} with noise, got "
            f"{schedule.name!r} of {schedule.lags} steps"
        )


def needs_vectors(method: str, operator: Operator) -> None:
    """Raises ValueError for an operator without singular vectors."""
    if not operator.decomposed:
        raise ValueError(
            f"operator: expected one with singular vectors (decomposed) for method={method!r} with noise, got "
            f"{type(operator).__name__}, which has none; use method='diffpir' or 'pigdm'"
        )
