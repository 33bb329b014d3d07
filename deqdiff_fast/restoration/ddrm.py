"""DDRM: measured components are the measurement with the noise of each level, drawn anew.

Kawar, Elad, Ermon, Song 2022, arXiv 2201.11793, equations 4, 7 and 8, with their default eta_b = 1; eta is the
schedule's.
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
class DDRM:
    """Restoration in singular vectors; needs those, and a one-step schedule."""

    needs_vjp = False

    @property
    def name(self) -> str:
        return "ddrm"

    def check(self, operator: Operator, schedule: Schedule, noisy: bool) -> None:
        """See `Method.check`."""
        needs_vectors(self.name, operator)
        needs_one_step(self.name, schedule)

    def coordinates(self, noisy: bool) -> Coordinates:
        """See `Method.coordinates`."""
        return KnownVectors(fresh=True) if noisy else KnownRange(fresh=True)

    def restored(self, x0: Tensor, x: Tensor, rows: Rows) -> Tensor:
        """The prediction itself: all that there is to do the coordinates do."""
        return x0
