"""What is known of data before any is seen: a power spectrum by the shape of a sample.

Natural images have a spectrum that falls as 1 / f^2 (Field 1987, doi 10.1364/JOSAA.4.002379), and their colours vary
less than brightness does; that of most signals over time falls as 1 / f (Voss and Clarke 1975, doi 10.1038/258317a0).
Nothing here is fitted to any model.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from .spectral import MIN_VARIANCE, SpectralSlope

VARIANCE = 0.25  # of data scaled to [-1, 1], on the average
COLOUR = 0.1  # variance of opponent colours, relative to brightness
OPPONENT = ((1.0, 1.0, 1.0), (1.0, 0.0, -1.0), (1.0, -2.0, 1.0))


@lru_cache(maxsize=64)
def prior_spectrum(shape: tuple[int, ...]) -> SpectralSlope | None:
    """The spectrum to start from for samples of that shape, (C, ...) with spatial axes; None for vectors."""
    if len(shape) < 2:
        return None
    axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in shape[1:]), indexing="ij")
    power = 1 / (torch.stack([axis.square() for axis in axes]).sum(0) + 1)
    power = power.sqrt() if len(shape) == 2 else power
    variance, channels = power.expand(shape).clone(), torch.eye(shape[0], dtype=torch.float64)
    if shape[0] == 3 and len(shape) == 3:
        variance[1:] *= COLOUR
        channels = torch.tensor(OPPONENT, dtype=torch.float64)
        channels = channels / channels.norm(dim=1, keepdim=True)
    return SpectralSlope((variance / variance.mean() * VARIANCE).clamp_min(MIN_VARIANCE), channels)
