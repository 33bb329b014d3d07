"""Convolution along one axis as a matrix, for every kind of border."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Shape

PADDINGS = ("circular", "reflect", "replicate", "constant", "valid")


def convolution_matrix(kernel: Tensor, size: int, padding: str) -> Tensor:
    """y[i] = sum_j kernel[j] x[i + k // 2 - j] for signals of a length, as (..., m, n) for kernels (..., k).

    Outside of the signal x is 0 ("constant"), its last value ("replicate"), mirrored without repeating that
    ("reflect") or periodic; with "valid" only the m = n - k + 1 outputs that need nothing outside are kept.
    """
    length = kernel.shape[-1]
    first = length - 1 - length // 2 if padding == "valid" else 0
    outputs = size - length + 1 if padding == "valid" else size
    taps = torch.arange(outputs)[:, None] + first + length // 2 - torch.arange(length)  # (m, k)
    weights = kernel[..., None, :].expand(*kernel.shape[:-1], outputs, length)
    if padding == "constant":
        weights = weights * ((taps >= 0) & (taps < size))
    if padding == "circular":
        taps = taps % size
    elif padding == "reflect":
        period = max(2 * size - 2, 1)
        taps = taps % period
        taps = torch.where(taps < size, taps, period - taps)
    taps = taps.clamp(0, size - 1).expand(weights.shape)
    matrix = kernel.new_zeros(*kernel.shape[:-1], outputs, size)
    return matrix.scatter_add_(-1, taps, weights)


def convolution_matrices(factors: tuple[Tensor, Tensor], x_shape: Shape, padding: str) -> tuple[Tensor | None, ...]:
    """Matrices along C, H and W of a kernel that is a product; kernels that all share are (m, n)."""
    along = [convolution_matrix(factor, size, padding) for factor, size in zip(factors, x_shape[2:])]
    return None, *(matrix[0, 0] if matrix.shape[:2] == (1, 1) else matrix for matrix in along)


def kernel_factors(kernel: Tensor, tolerance: float) -> tuple[Tensor, Tensor] | None:
    """Kernels (b, c, h, w) as products of (b, c, h) and (b, c, w); None where one of them is none."""
    u, s, vt = torch.linalg.svd(kernel, full_matrices=False)
    if s.shape[-1] > 1 and bool((s[..., 1] > tolerance * s[..., 0]).any()):
        return None
    root = s[..., :1].sqrt()
    rows, columns = u[..., 0] * root, vt[..., 0, :] * root
    sign = torch.where(rows.sum(-1, keepdim=True) < 0, -1.0, 1.0).to(rows)
    return rows * sign, columns * sign


def check_kernel_fits(kernel: Shape, size: Shape) -> None:
    """Raise where a kernel (h, w) is larger than images (H, W)."""
    if kernel[0] > size[0] or kernel[1] > size[1]:
        raise ValueError(f"kernel: {kernel[0]} x {kernel[1]} is larger than the images, {size[0]} x {size[1]}")


__all__ = ["PADDINGS", "check_kernel_fits", "convolution_matrices", "convolution_matrix", "kernel_factors"]
