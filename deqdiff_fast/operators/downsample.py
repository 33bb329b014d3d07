"""Super-resolution from averages over blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Shape
from .separable import Separable


class Downsample(Separable):
    """Average pooling: every measurement is the mean of a block of `factor` x `factor` pixels.

    Args:
        factor: a whole number >= 2, say 4.

    Raises:
        ValueError: no such factor; or, when it is used, one that does not divide height and width.
    """

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = check_factor(factor)

    def axis_matrices(self, x_shape: Shape) -> tuple[Tensor | None, ...]:
        """(H / factor, H) and (W / factor, W) matrices with 1 / factor in the blocks."""
        return None, *(self._averages(blocks) for blocks in divided(x_shape, self.factor))

    def input_shape(self, y_shape: Shape) -> tuple[int, ...]:
        """(B, C, factor H', factor W') of measurements (B, C, H', W')."""
        return (*y_shape[:2], y_shape[2] * self.factor, y_shape[3] * self.factor)

    def _averages(self, blocks: int) -> Tensor:
        row = torch.full((1, self.factor), 1 / self.factor, dtype=torch.float64)
        return torch.kron(torch.eye(blocks, dtype=torch.float64), row)


def check_factor(factor: int) -> int:
    """factor, if it is one."""
    if isinstance(factor, bool) or not isinstance(factor, int) or factor < 2:
        raise ValueError(f"factor: expected a whole number >= 2, got {factor!r}")
    return factor


def divided(x_shape: Shape, factor: int) -> tuple[int, int]:
    """(H / factor, W / factor)."""
    height, width = x_shape[2:]
    if height % factor or width % factor:
        raise ValueError(f"factor: {factor} does not divide images of {height} x {width}; crop or pad them first")
    return height // factor, width // factor


__all__ = ["Downsample"]
