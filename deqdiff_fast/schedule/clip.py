"""Clipping of the denoised estimate as part of a chain."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .tables import vector


@dataclass(frozen=True, eq=False)
class Clip:
    """Clipping of the denoised estimate, as a pointwise correction of the model output.

    o <- o + gain_i (clamp(x0, -range, range) - x0), with x0 = p x_i + q o from `Schedule.denoised_coef`.

    Args:
        range: largest absolute value of the denoised estimate.
        gain: (T,) float64.

    Raises:
        ValueError: a range that is not finite and > 0, or a gain that is not a finite vector.
    """

    range: float
    gain: Tensor

    def __post_init__(self) -> None:
        if not 0 < self.range < float("inf"):
            raise ValueError(f"clip.range: expected a finite value > 0, got {self.range}")
        object.__setattr__(self, "gain", vector("clip.gain", self.gain))
