"""What a restorer returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..solution import Stats


@dataclass
class Restoration:
    """Restored samples, and how well they agree with the measurements."""

    sample: Tensor
    """(B, *shape), dtype of the measurements."""
    converged: Tensor
    """(B,) bool, on the CPU, as in `Solution`."""
    consistency: Tensor
    """(B,) float64, on the CPU: ||A x - y|| / ||y||, of what y has in the range of A; with noise about its share."""
    sigma: Tensor
    """(B,) float64, on the CPU: the standard deviation of the noise that was assumed."""
    stats: Stats


@dataclass
class FittedNoise:
    """Initial noise that a loss prefers, and what becomes of it."""

    noise: Tensor
    """(B, *shape): give it to `restore(noise=...)`."""
    restoration: Restoration
    """Of that noise, with the frozen noise of the descent."""
    losses: Tensor
    """(steps, B) float64, on the CPU."""
