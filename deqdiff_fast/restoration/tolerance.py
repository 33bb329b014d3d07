"""How far the unknowns may be off: the error that is allowed is relative to the sample, of which they are a part."""

from __future__ import annotations

import torch
from torch import Tensor

FACTORS = (4.0, 3.0, 2.0, 1.5)  # a few, so that what a planner learns of one request serves the next


def looser(known: Tensor, variance: float) -> float:
    """By how much the relative error of the unknowns may exceed that of the sample.

    Args:
        known: (B, *shape), the known part of the sample.
        variance: what is expected of the unknown part, on the average over elements.
    """
    share = known.detach().flatten(1).double().square().mean(1) / max(variance, 1e-12)
    allowed = float((1 + share).sqrt().min())
    return next((factor for factor in FACTORS if factor <= allowed), 1.0)


def shares(known: Tensor, sample: Tensor) -> Tensor:
    """(B,) float64 on the CPU: the norm of the unknown part over that of the sample."""
    size = sample.detach().flatten(1).double().norm(dim=1).clamp_min(1e-300)
    found: Tensor = ((sample - known).detach().flatten(1).double().norm(dim=1) / size).cpu()
    return torch.where(found.isfinite(), found, 1.0)
