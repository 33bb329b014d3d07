"""The reversible iteration of RevDEQ (arXiv 2509.12917): y <- (1 - b) y + b f(z), z <- (1 - b) z + b f(y).

Both states are float64 whatever the dtype of f is: see reversal.py, which runs it backwards.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..gradient.base import Relaxed
from .base import Evaluate, keep_inactive, secant, sizes


@dataclass(frozen=True)
class ReversibleSolver(Relaxed):
    """y <- (1 - b) y + b f(z), z <- (1 - b) z + b f(y): two evaluations a step (RevDEQ, arXiv 2509.12917).

    Args:
        relaxation: b in (0, 2), not 1.

    Raises:
        ValueError: `relaxation` is out of its range.
    """

    def start(self, z: Tensor) -> ReversibleIteration:
        """See `FixedPointSolver.start`."""
        return ReversibleIteration(self, z)


class ReversibleIteration:
    """See `Iteration`."""

    def __init__(self, settings: ReversibleSolver, z: Tensor) -> None:
        self.relaxation = settings.relaxation
        self.z = z.double() if z.device.type != "mps" else z
        self.y, self.value = self.z, self.z
        self._before = self._now = self.z.detach(), self.z.detach()  # z and f(z) of the last two steps

    def record(self, value: Tensor) -> tuple[Tensor, Tensor]:
        self._before, self._now = self._now, (self.z.detach(), value.detach())
        self.value = value
        return sizes(value, self.z.to(value.dtype))

    def secant(self) -> tuple[Tensor, Tensor]:
        return secant(self._now, self._before)

    def advance(self, evaluate: Evaluate, active: Tensor | None) -> None:
        self.y = self.update(self.y, self.value, active)
        self.z = self.update(self.z, evaluate(self.y), active)

    def update(self, old: Tensor, value: Tensor, active: Tensor | None) -> Tensor:
        """(1 - b) old + b value for the active samples."""
        b = self.relaxation
        return keep_inactive((1 - b) * old + b * value, old, active)

    def best(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.z, self.value, torch.zeros(len(self.z), dtype=torch.int64, device="cpu")
