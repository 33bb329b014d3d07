"""DDNM: the range part of the clean sample is the measurement's, the null part the model's.

Wang, Yu, Zhang 2022, arXiv 2212.00490. With noise in the measurements their DDNM+, see `KnownVectors`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..operators import Operator
from ..schedule import Schedule
from .base import Coordinates, Rows, needs_one_step, needs_vectors
from .known_range import KnownRange
from .known_vectors import KnownVectors


@dataclass(frozen=True)
class DDNM:
    """Null-space restoration; noise in the measurements needs singular vectors and a one-step schedule."""

    needs_vjp = False

    @property
    def name(self) -> str:
        return "ddnm"

    def check(self, operator: Operator, schedule: Schedule, noisy: bool) -> None:
        """See `Method.check`."""
        if noisy:
            needs_vectors(self.name, operator)
            needs_one_step(self.name, schedule)

    def coordinates(self, noisy: bool) -> Coordinates:
        """See `Method.coordinates`."""
        return KnownVectors() if noisy else KnownRange()

    def restored(self, x0: Tensor, x: Tensor, rows: Rows) -> Tensor:
        """The prediction itself: all that there is to do the coordinates do."""
        return x0
