"""Reference of the marking of converged rows, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..stopping import FIRST_RATE, MAX_RATE, MIN_RATE, TINY_OF


def mark_converged(
    sq_diff: Tensor, sq_norm: Tensor, previous: Tensor, strict: Tensor, freeze: float, floor: float
) -> None:
    """r = |step| / |state|, p = r of the round before, rho = r / p in [0.1, 0.9] (0.5 where p is NaN); left = r rho /
    (1 - rho). Converged where left <= freeze strict or r <= floor. previous <- r^2; sq_diff <- sq_norm times r^2, at
    most freeze^2 where the row has converged, else at least (2 freeze)^2. No host sync."""
    step = sq_diff / sq_norm.clamp_min(TINY_OF[sq_norm.dtype])
    rho = (step / previous).nan_to_num_(FIRST_RATE**2, MAX_RATE**2).clamp_(MIN_RATE**2, MAX_RATE**2).sqrt_()
    left = step * (rho / (1 - rho)).square_()
    converged = (left <= (freeze * strict) ** 2) | (step <= floor**2)
    previous.copy_(step)
    step = torch.where(converged, step.clamp_max(freeze**2), step.clamp_min((2 * freeze) ** 2))
    sq_diff.copy_(step * sq_norm.clamp_min(TINY_OF[sq_norm.dtype]))
