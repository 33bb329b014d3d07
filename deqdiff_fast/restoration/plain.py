"""Coordinates that leave the chain as it is: u = x, w = x0."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .base import Rows, Start, Task


@dataclass(frozen=True)
class Plain:
    """See above; the noise of the measurements is given to the method as `data["sigma"]`, they as `data["y"]`."""

    fresh = False

    def begin(self, task: Task, noise: Tensor, draws: Tensor | None) -> Start:
        """See `Coordinates.begin`."""
        assert task.sigma is not None
        return Start(noise, task.frozen(draws), {"y": task.y, "sigma": task.sigma})

    def state(self, u: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """See `Coordinates.state`."""
        return u, u

    def clean(self, x0: Tensor, unknown: Tensor, rows: Rows) -> Tensor:
        """See `Coordinates.clean`."""
        return x0

    def finish(self, u: Tensor, task: Task, data: dict[str, Any]) -> Tensor:
        """See `Coordinates.finish`."""
        return u
