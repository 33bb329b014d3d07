"""Super-resolution from bicubic downsampling."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Shape
from .downsample import check_factor, divided
from .separable import Separable


class Bicubic(Separable):
    """Downsampling by the cubic kernel, widened by the factor against aliasing, as Matlab's imresize does it.

    Cubic convolution with a = -1/2 (Keys, IEEE Trans. ASSP 29, 1981); at the borders the image is mirrored, its last
    pixel repeated.

    Args:
        factor: a whole number >= 2: 2, 4, 8.

    Raises:
        ValueError: no such factor; or, when it is used, one that does not divide height and width.
    """

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = check_factor(factor)

    def axis_matrices(self, x_shape: Shape) -> tuple[Tensor | None, ...]:
        """(H / factor, H) and (W / factor, W) matrices."""
        return None, *(self._weights(outputs) for outputs in divided(x_shape, self.factor))

    def input_shape(self, y_shape: Shape) -> tuple[int, ...]:
        """(B, C, factor H', factor W') of measurements (B, C, H', W')."""
        return (*y_shape[:2], y_shape[2] * self.factor, y_shape[3] * self.factor)

    def _weights(self, outputs: int) -> Tensor:
        size, support = outputs * self.factor, 4 * self.factor
        centre = (torch.arange(outputs, dtype=torch.float64) + 0.5) * self.factor - 0.5
        first = (centre - support / 2).ceil()
        taps = first[:, None] + torch.arange(support, dtype=torch.float64)  # of the padded image
        weights = cubic((taps - centre[:, None]) / self.factor)
        weights = weights / weights.sum(1, keepdim=True)
        mirrored = taps.long() % (2 * size)
        mirrored = torch.where(mirrored < size, mirrored, 2 * size - 1 - mirrored)
        return torch.zeros(outputs, size, dtype=torch.float64).scatter_add_(1, mirrored, weights)


def cubic(x: Tensor) -> Tensor:
    """Keys's kernel with a = -1/2, 0 for |x| >= 2."""
    x = x.abs()
    inner = 1.5 * x**3 - 2.5 * x**2 + 1
    outer = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return torch.where(x <= 1, inner, torch.where(x < 2, outer, 0))


__all__ = ["Bicubic"]
