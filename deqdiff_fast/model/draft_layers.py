"""The learned part of a draft: convolutions over blocks of 1-D, 2-D or 3-D data, or a perceptron on small data."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SMALL = 128  # elements: up to here every element sees every other
KERNEL = {1: 5, 2: 3, 3: 3}  # taps of a convolution along each axis, by the number of axes
BLOCK = {1: 4, 2: 2, 3: 2}  # elements of a block along each axis ...
GRID = 32  # ... of data of at most about so many blocks; larger data has larger ones
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def block_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Elements of a block along each axis of samples (C, *axes), powers of two that divide the axes; () for small data
    and for data with more axes than there are convolutions, which a perceptron takes."""
    axes = shape[1:]
    if not axes or len(axes) > max(CONV) or math.prod(shape) <= SMALL:
        return ()
    found = []
    for size in axes:
        wanted = max(BLOCK[len(axes)], 1 << max(size // GRID, 1).bit_length() - 1)
        found.append(math.gcd(size, wanted))
    return tuple(found)


class DraftLayers(nn.Module):
    """What is shared by all drafts: `first`, `inner` and `last`, each scaled and shifted by the noise level.

    Args:
        shape: (C, *axes), of a sample.
        width, depth: of the layers between the first and the last.
        block: as `block_of` returns it.
        channels: further input channels.
    """

    def __init__(
        self, shape: tuple[int, ...], width: int, depth: int, block: tuple[int, ...], channels: int = 0
    ) -> None:
        super().__init__()
        self.shape, self.width, self.depth, self.block = shape, width, depth, block
        each = math.prod(block) if block else math.prod(shape[1:])
        self.first = self._layer((2 * shape[0] + channels) * each, width)
        self.inner = nn.ModuleList(self._layer(width, width) for _ in range(depth))
        self.last = self._layer(width, shape[0] * each)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]

    def _layer(self, inputs: int, outputs: int) -> nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d:
        if not self.block:
            return nn.Linear(inputs, outputs)
        kernel = KERNEL[len(self.block)]
        made: Any = CONV[len(self.block)](inputs, outputs, kernel, padding=kernel // 2)
        layer: nn.Conv1d | nn.Conv2d | nn.Conv3d = made
        return layer

    def correction(self, parts: list[Tensor], scales: Tensor, shifts: Tensor) -> Tensor:
        """(n, *shape). parts: (n, channels, *axes) each; scales, shifts: (n, width (depth + 1))."""
        scale, shift = (self._per_element(table).chunk(self.depth + 1, 1) for table in (scales, shifts))
        hidden = self.first(self._fold(torch.cat(parts, 1)))
        hidden = F.silu(torch.addcmul(shift[0], hidden, scale[0]))
        for k, layer in enumerate(self.inner, 1):
            hidden = hidden + F.silu(torch.addcmul(shift[k], layer(hidden), scale[k]))
        return self._unfold(self.last(hidden))

    def _per_element(self, table: Tensor) -> Tensor:
        return table.view(*table.shape, *[1] * len(self.block))

    def _fold(self, x: Tensor) -> Tensor:
        """(n, C, *axes) -> (n, C prod(block), *blocks): the elements of a block as channels."""
        if len(set(self.block)) == 1 and len(self.block) == 2:
            return F.pixel_unshuffle(x, self.block[0])
        if not self.block:
            return x.flatten(1)
        count, axes = len(self.block), [(size // b, b) for size, b in zip(x.shape[2:], self.block)]
        x = x.reshape(*x.shape[:2], *(n for pair in axes for n in pair))
        inside, outside = range(3, 3 + 2 * count, 2), range(2, 2 + 2 * count, 2)
        return x.permute(0, 1, *inside, *outside).reshape(len(x), -1, *(outer for outer, _ in axes))

    def _unfold(self, x: Tensor) -> Tensor:
        if len(set(self.block)) == 1 and len(self.block) == 2:
            return F.pixel_shuffle(x, self.block[0])
        if not self.block:
            return x.view(-1, *self.shape)
        count = len(self.block)
        x = x.reshape(len(x), self.shape[0], *self.block, *x.shape[2:])
        order = [axis for k in range(count) for axis in (2 + count + k, 2 + k)]
        return x.permute(0, 1, *order).reshape(-1, *self.shape)
