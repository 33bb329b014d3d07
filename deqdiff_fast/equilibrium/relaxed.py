"""Relaxed (damped) fixed-point iteration: z <- (1 - w) z + w f(z)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Evaluate, keep_inactive, secant, sizes


@dataclass(frozen=True)
class RelaxedSolver:
    """z <- (1 - w) z + w f(z), the damped fixed-point iteration (Krasnoselskii and Mann).

    Args:
        damping: w, the weight of f(z), in (0, 1]; 1 is the plain iteration z <- f(z).

    Raises:
        ValueError: `damping` is out of its range.
    """

    damping: float = 1.0

    def __post_init__(self) -> None:
        w = self.damping
        if isinstance(w, bool) or not isinstance(w, (int, float)) or not 0 < w <= 1:
            raise ValueError(f"damping: expected a number in (0, 1], got {w!r}")

    @property
    def name(self) -> str:
        return f"relaxed(damping={self.damping:g})"

    def start(self, z: Tensor) -> RelaxedIteration:
        """See `FixedPointSolver.start`."""
        return RelaxedIteration(self, z)


class RelaxedIteration:
    """See `Iteration`; differentiable as it is."""

    def __init__(self, settings: RelaxedSolver, z: Tensor) -> None:
        self.settings, self.z, self.value = settings, z, z
        self._before = self._now = z.detach(), z.detach()  # z and f(z) of the last two steps

    def record(self, value: Tensor) -> tuple[Tensor, Tensor]:
        self._before, self._now = self._now, (self.z.detach(), value.detach())
        self.value = value
        return sizes(value, self.z)

    def secant(self) -> tuple[Tensor, Tensor]:
        return secant(self._now, self._before)

    def advance(self, evaluate: Evaluate, active: Tensor | None) -> None:
        w = self.settings.damping
        self.z = keep_inactive(self.value if w == 1 else torch.lerp(self.z, self.value, w), self.z, active)

    def best(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.z, self.value, torch.zeros(len(self.z), dtype=torch.int64, device="cpu")
