"""Reference of the verdict on a round's steps, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

TINY = 1e-30  # keeps 0 / 0 a zero residual; Inf / Inf and NaN stay NaN
FASTEST, SLOWEST, FIRST = 0.1, 0.9, 0.5  # bounds of rho, and what a row's first step is worth


def judge_steps(
    sq_diff: Tensor, sq_norm: Tensor, previous: Tensor, strict: Tensor, freeze: float, floor: float
) -> None:
    """r = |step| / |state|, p = r of the round before, rho = r / p in [0.1, 0.9] (0.5 where p is NaN); left = r rho /
    (1 - rho). Final where left <= freeze strict or r <= floor. previous <- r^2; sq_diff <- sq_norm times r^2, at most
    freeze^2 where the row is final, else at least (2 freeze)^2. No host sync."""
    step = sq_diff / sq_norm.clamp_min(TINY)
    rho = (step / previous).nan_to_num_(FIRST**2, SLOWEST**2).clamp_(FASTEST**2, SLOWEST**2).sqrt_()
    left = step * (rho / (1 - rho)).square_()
    final = (left <= (freeze * strict) ** 2) | (step <= floor**2)
    previous.copy_(step)
    step = torch.where(final, step.clamp_max(freeze**2), step.clamp_min((2 * freeze) ** 2))
    sq_diff.copy_(step * sq_norm.clamp_min(TINY))
