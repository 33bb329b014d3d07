"""Super-resolution from bicubic downsampling."""

from __future__ import annotations

import torch
from torch import Tensor

from .downsample import Decimation


class Bicubic(Decimation):
    """Downsampling by the cubic kernel, widened by the factor against aliasing, as Matlab's imresize does it.

    Cubic convolution with a = -1/2 (Keys, IEEE Trans. ASSP 29, 1981); at the borders the image is mirrored, its last
    pixel repeated.

    Args:
        factor: a whole number >= 2: 2, 4, 8.

    Raises:
        ValueError: no such factor; or, when it is used, one that does not divide height and width.
    """

    def along(self, outputs: int) -> Tensor:
        """Of 4 `factor` taps, of mirrored images."""
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
