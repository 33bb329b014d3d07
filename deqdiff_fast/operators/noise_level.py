"""The standard deviation of white noise in measurements that are images."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._devices import with_torch_defaults
from .base import check_images

_NORMAL = 0.6744897501960817  # the median of |n| for n standard normal


@with_torch_defaults
def estimate_sigma(y: Tensor, mask: Tensor | None = None) -> Tensor:
    """The standard deviation of white Gaussian noise in images: the median of their finest diagonal details.

    median(|d|) / 0.6745, d the coefficients of the finest diagonal band of a wavelet transform: Donoho and Johnstone,
    "Ideal spatial adaptation by wavelet shrinkage", Biometrika 81, 1994, section 3.1; here (x - x_right - x_below +
    x_diagonal) / 2 of Haar's wavelet, at every pixel. Texture counts as noise. Where there are several channels, an
    orthonormal transform across them parts what they have in common from their differences, which have the same noise
    and far less texture: the smaller estimate is taken. Correlated noise is not seen.

    Args:
        y: (B, C, H, W) with H, W >= 2.
        mask: True where y was measured, broadcastable to y; other pixels are left out.

    Returns:
        (B,), in the units of y.

    Raises:
        ValueError: y is no batch of images, is smaller than that or not finite, or nothing is left of a sample.
    """
    check_images(y, "estimate_sigma")
    if min(y.shape[1:]) < 1 or min(y.shape[2:]) < 2:
        raise ValueError(f"estimate_sigma: expected images of at least 2 x 2 pixels, got {tuple(y.shape)}")
    working = y.to(torch.promote_types(y.dtype, torch.float32))
    known = torch.ones_like(working, dtype=torch.bool)
    if mask is not None:
        known = mask.to(device=y.device, dtype=torch.bool).expand(y.shape)
        working = working.where(known, torch.zeros_like(working))
    if not bool(working.isfinite().all()):
        raise ValueError("estimate_sigma: y holds NaN or infinity")
    whole = _median(working, known)
    if not bool(whole.isfinite().all()):
        raise ValueError("estimate_sigma: a sample has no 2 x 2 pixels that are all measured")
    if y.shape[1] > 1:
        differences = torch.einsum("dc,bchw->bdhw", _across(y.shape[1]).to(working), working)
        several = _median(differences, known.all(1, keepdim=True).expand(differences.shape))
        whole = torch.fmin(whole, several)  # NaN where no pixel is known in all channels
    return (whole / _NORMAL).to(y.dtype)


def _median(x: Tensor, known: Tensor) -> Tensor:
    """(B,) medians of the sizes of diagonal details; NaN where there are none."""
    corners = (slice(None, -1), slice(1, None))
    a, b, c, d = (x[..., rows, columns] for rows in corners for columns in corners)
    complete = torch.stack([known[..., rows, columns] for rows in corners for columns in corners]).all(0)
    details = ((a - b - c + d) / 2).abs().where(complete, torch.full_like(a, torch.nan))
    return details.flatten(1).nanmedian(1).values


def _across(channels: int) -> Tensor:
    """The cosine transform across channels without its first row, the mean: (C - 1, C), orthonormal."""
    row = torch.arange(1, channels, dtype=torch.float64)[:, None]
    column = torch.arange(channels, dtype=torch.float64)
    return (math.pi / channels * row * (column + 0.5)).cos() * math.sqrt(2 / channels)


__all__ = ["estimate_sigma"]
