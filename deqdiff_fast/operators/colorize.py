"""Colorization: only a weighted sum of the channels is measured."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .base import Shape
from .separable import Separable


class Colorize(Separable):
    """y (B, 1, H, W) = sum over c of weights[c] x[:, c].

    Args:
        weights: one for each channel; the default is the luma of ITU-R BT.601, (1/3, 1/3, 1/3) the mean.

    Raises:
        ValueError: weights that are not finite, or all zero; or, when it is used, another number of channels.
    """

    def __init__(self, weights: Sequence[float] = (0.299, 0.587, 0.114)) -> None:
        super().__init__()
        self.weights = tuple(float(weight) for weight in weights)
        if not all(map(math.isfinite, self.weights)) or not any(self.weights):
            raise ValueError(f"weights: expected finite numbers, not all of them zero, got {self.weights}")

    def axis_matrices(self, x_shape: Shape) -> tuple[Tensor | None, ...]:
        """The weights as a (1, C) matrix along the channels."""
        if x_shape[1] != len(self.weights):
            raise ValueError(f"weights: there are {len(self.weights)}, images of {x_shape[1]} channels came")
        return torch.tensor([self.weights], dtype=torch.float64), None, None

    def input_shape(self, y_shape: Shape) -> tuple[int, ...]:
        """(B, C, H, W) of measurements (B, 1, H, W)."""
        if y_shape[1] != 1:
            raise ValueError(f"y: expected measurements (B, 1, H, W) of Colorize, got {tuple(y_shape)}")
        return (y_shape[0], len(self.weights), *y_shape[2:])


__all__ = ["Colorize"]
