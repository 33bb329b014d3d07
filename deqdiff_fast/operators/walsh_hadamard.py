"""Compressed sensing: some coefficients of a Walsh-Hadamard transform are measured."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._devices import with_torch_defaults
from .base import Operator, Shape, check_images, compute_dtype, per_device


class WalshHadamard(Operator):
    """y (B, C, m): for each channel, m of the N = H W Walsh-Hadamard coefficients of its pixels in a random order.

    The order of the pixels and the coefficients are drawn once, from the seed; the coefficient that is the mean of all
    pixels is always among them. Rows of A are orthonormal, so that A_dagger is A_adjoint.

    Args:
        size: (H, W) of the images; their product must be a power of two.
        ratio: m / N, above 0 and at most 1; m is rounded to the nearest whole number, and at least 1.
        seed: of the two draws.

    Raises:
        ValueError: no such size or ratio; or, when it is used, images or measurements of another size.
    """

    decomposed = True

    @with_torch_defaults
    def __init__(self, size: tuple[int, int], ratio: float, seed: int = 0) -> None:
        height, width = size
        numel = height * width
        if min(size) < 1 or numel & (numel - 1):
            raise ValueError(f"size: expected (H, W) whose product is a power of two, got {tuple(size)}")
        if not 0 < ratio <= 1:
            raise ValueError(f"ratio: expected a number above 0 and at most 1, got {ratio!r}")
        self.size, self.ratio, self.seed = (height, width), ratio, seed
        self.count = max(1, round(ratio * numel))
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(numel, generator=generator)
        others = 1 + torch.randperm(numel - 1, generator=generator)[: self.count - 1]
        chosen = torch.cat([torch.zeros(1, dtype=torch.int64), others]).sort().values
        bits = numel.bit_length() - 1
        self._constants = {
            "order": order,
            "back": order.argsort(),
            "chosen": chosen,
            "measured": torch.zeros(numel, dtype=torch.float64).index_fill_(0, chosen, 1),
            "left": _sylvester(bits - bits // 2),
            "right": _sylvester(bits // 2),
        }
        self._copies: dict[str, dict[Any, Tensor]] = {name: {} for name in self._constants}

    def A(self, x: Tensor) -> Tensor:
        """The measured coefficients (B, C, m) of images (B, C, H, W)."""
        return self.U(self.V_adjoint(x))

    def A_adjoint(self, y: Tensor) -> Tensor:
        """The transpose, (B, C, m) -> (B, C, H, W)."""
        return self.V(self.U_adjoint(y))

    def A_dagger(self, y: Tensor) -> Tensor:
        """As `A_adjoint`."""
        return self.A_adjoint(y)

    def V_adjoint(self, x: Tensor) -> Tensor:
        """All coefficients, (B, C, N)."""
        check_images(x, "WalshHadamard.V_adjoint")
        if tuple(x.shape[2:]) != self.size:
            raise ValueError(f"WalshHadamard: it is for images of {self.size}, got {tuple(x.shape)}")
        return self._transform(x.flatten(2)[..., self._get("order", x)])

    def V(self, c: Tensor) -> Tensor:
        """Images of all coefficients."""
        pixels = self._transform(c)[..., self._get("back", c)]
        return pixels.reshape(*c.shape[:-1], *self.size)

    def U_adjoint(self, y: Tensor) -> Tensor:
        """(B, C, N), zeros where nothing was measured."""
        self.input_shape(y.shape)
        zeros = y.new_zeros((*y.shape[:-1], math.prod(self.size)))
        return zeros.index_copy(-1, self._get("chosen", y), y)

    def U(self, c: Tensor) -> Tensor:
        """The measured ones among all coefficients."""
        return c[..., self._get("chosen", c)]

    def singular_values(self, x_shape: Shape, device: torch.device | str, dtype: torch.dtype) -> Tensor:
        """(N,): 1 where a coefficient is measured."""
        return per_device(self._copies["measured"], self._constants["measured"], torch.device(device), dtype)

    def input_shape(self, y_shape: Shape) -> tuple[int, ...]:
        """(B, C, H, W) of measurements (B, C, m)."""
        if len(y_shape) != 3 or y_shape[2] != self.count:
            raise ValueError(f"WalshHadamard: expected measurements (B, C, {self.count}), got {tuple(y_shape)}")
        return (*y_shape[:2], *self.size)

    def _transform(self, x: Tensor) -> Tensor:
        """The orthonormal transform of the last dimension: H_N as the Kronecker product of two small ones."""
        left, right = (self._get(name, x, compute_dtype(x.dtype)) for name in ("left", "right"))
        square = x.to(left.dtype).reshape(*x.shape[:-1], len(left), len(right))
        return (left @ square @ right).flatten(-2).to(x.dtype)

    def _get(self, name: str, like: Tensor, dtype: torch.dtype = torch.int64) -> Tensor:
        return per_device(self._copies[name], self._constants[name], like.device, dtype)


def _sylvester(bits: int) -> Tensor:
    """The orthonormal Hadamard matrix of 2^bits rows, symmetric."""
    step = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / math.sqrt(2)
    matrix = torch.ones((1, 1), dtype=torch.float64)
    for _ in range(bits):
        matrix = torch.kron(matrix, step)
    return matrix


__all__ = ["WalshHadamard"]
