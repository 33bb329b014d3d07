"""Reference of the history of a solve with a draft and its least squares fit, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def fit(dz: Tensor, size: Tensor, ridge: float, floor: float) -> Tensor:
    """(n, n) S = Z (Z dZ dZ^T Z + ridge)^-1 Z, Z the inverse lengths of the columns worth keeping. dz: (n, D)."""
    length = dz.norm(dim=1)
    keep = length > floor * size  # a step of rounding size says nothing about the slope
    scale = torch.where(keep, 1 / length, 0)
    both = scale[:, None] * scale
    gram = torch.where(both > 0, (dz @ dz.T) * both, 0)
    found = torch.linalg.inv(gram + torch.diag(torch.where(keep, ridge, 1.0).to(gram.dtype))) * both
    return found if bool(found.isfinite().all()) else torch.zeros_like(found)


def draft_secants(
    states, predictions, draft_cache, anchor_rows, lo, hi, z, remainder, filled, secant_weights, column, ridge=1e-6,
    floor=1e-5,
) -> None:  # fmt: skip
    """Where lo[b] <= anchor_rows[n] < hi[b]: z[column, n] <- X, remainder[column, n] <- E - draft_cache[n].

    secant_weights[n] <- S of dz_k = z[column - k, n] - X, k = 1 ... filled[n], zero elsewhere; filled[n] counts up.
    """
    ring = z.shape[0]
    for n, row in enumerate(anchor_rows.tolist()):
        for b in range(states.shape[1]):
            if not int(lo[b]) <= row < int(hi[b]):
                continue
            x, count = states[row, b].double(), min(int(filled[n, b]), ring - 1)
            older = [(column - k) % ring for k in range(1, count + 1)]
            secant_weights[n, b] = 0
            if count:
                secant_weights[n, b, :count, :count] = fit(z[older, n, b].double() - x, x.norm(), ridge, floor)
            z[column, n, b] = states[row, b]
            remainder[column, n, b] = (predictions[row, b].double() - draft_cache[n, b].double()).to(remainder.dtype)
            filled[n, b] = count + 1
