"""Super-resolution from averages over blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Shape
from .separable import Separable


class Decimation(Separable):
    """Fewer pixels by a factor, along height and width alike. Arguments and errors are those of `Downsample`."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        if isinstance(factor, bool) or not isinstance(factor, int) or factor < 2:
            raise ValueError(f"factor: expected a whole number >= 2, got {factor!r}")
        self.factor = factor

    def along(self, outputs: int) -> Tensor:
        """(outputs, factor * outputs) float64, of one axis."""
        raise NotImplementedError

    def axis_matrices(self, x_shape: Shape) -> tuple[Tensor | None, ...]:
        """(H / factor, H) and (W / factor, W) matrices."""
        height, width = x_shape[2:]
        if height % self.factor or width % self.factor:
            raise ValueError(
                f"factor: {self.factor} does not divide images of {height} x {width}; crop or pad them first"
            )
        return None, self.along(height // self.factor), self.along(width // self.factor)

    def input_shape(self, y_shape: Shape) -> tuple[int, ...]:
        """(B, C, factor H', factor W') of measurements (B, C, H', W')."""
        return (*y_shape[:2], y_shape[2] * self.factor, y_shape[3] * self.factor)


class Downsample(Decimation):
    """Average pooling: every measurement is the mean of a block of `factor` x `factor` pixels.

    Args:
        factor: a whole number >= 2, say 4.

    Raises:
        ValueError: no such factor; or, when it is used, one that does not divide height and width.
    """

    def along(self, outputs: int) -> Tensor:
        """1 / factor in the blocks."""
        row = torch.full((1, self.factor), 1 / self.factor, dtype=torch.float64)
        return torch.kron(torch.eye(outputs, dtype=torch.float64), row)


__all__ = ["Downsample"]
