"""How near pictures are to the truth: PSNR and SSIM of samples in [-1, 1]."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv2d

WINDOW, SPREAD, K1, K2 = 11, 1.5, 0.01, 0.03
RANGE = 2.0  # of values


def psnr(sample: Tensor, truth: Tensor) -> Tensor:
    """(B,) float64 in decibels. (B, C, H, W) each; the sample is clamped to [-1, 1]."""
    off = sample.double().clamp(-1, 1) - truth.double()
    return 10 * torch.log10(RANGE**2 / off.square().flatten(1).mean(1).clamp_min(1e-20))


def ssim(sample: Tensor, truth: Tensor) -> Tensor:
    """(B,) float64, the mean over pixels and channels; Wang et al. 2004, doi 10.1109/TIP.2003.819861.

    Windows are Gaussian, of 11 pixels or as many as the picture has, and lie inside of it.
    """
    a, b = sample.double().clamp(-1, 1), truth.double()
    size = min(WINDOW, *a.shape[2:])
    at = torch.arange(size, dtype=torch.float64, device=a.device) - (size - 1) / 2
    line = torch.exp(-at.square() / (2 * SPREAD**2))
    line = line / line.sum()
    kernel = torch.outer(line, line).expand(a.shape[1], 1, size, size)

    def mean(x: Tensor) -> Tensor:
        return conv2d(x, kernel, groups=x.shape[1])

    mean_a, mean_b = mean(a), mean(b)
    var_a, var_b = mean(a * a) - mean_a.square(), mean(b * b) - mean_b.square()
    both = mean(a * b) - mean_a * mean_b
    c1, c2 = (K1 * RANGE) ** 2, (K2 * RANGE) ** 2
    alike = (2 * mean_a * mean_b + c1) * (2 * both + c2)
    return (alike / ((mean_a.square() + mean_b.square() + c1) * (var_a + var_b + c2))).flatten(1).mean(1)
