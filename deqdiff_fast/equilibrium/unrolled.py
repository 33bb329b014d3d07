"""Unrolled: back-propagation through all steps of the solver, everything stored. The reference for the other modes."""

from __future__ import annotations

import torch
from torch import Tensor

from .anderson import AndersonIteration, AndersonSolver
from .base import FixedPointSolver, Iteration


class RecordedAnderson(AndersonIteration):
    """Anderson's iteration with a history that autograd can go back through: nothing is overwritten."""

    def __init__(self, settings: AndersonSolver, z: Tensor) -> None:
        super().__init__(settings, z[:, :0])
        self.z = z
        self._columns: dict[int, tuple[Tensor, Tensor]] = {}

    def store(self, value: Tensor) -> None:
        self._columns[self.column] = value, value - self.z

    def history(self) -> tuple[Tensor, Tensor]:
        values, residuals = zip(*(self._columns[column] for column in range(len(self._columns))))
        return torch.stack(values, 1), torch.stack(residuals, 1)


def start_recorded(solver: FixedPointSolver, z: Tensor) -> Iteration:
    """Begin a solve whose steps autograd records."""
    return RecordedAnderson(solver, z) if isinstance(solver, AndersonSolver) else solver.start(z)
