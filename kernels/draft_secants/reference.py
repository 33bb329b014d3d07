"""Reference of the secants of a draft's remainder: what a round remembers, and its least squares fit, in torch."""

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
    states, predictions, made, at, lo, hi, z, rest, filled, weights, column, ridge=1e-6, floor=1e-5
) -> None:  # fmt: skip
    """For anchors n with lo[b] <= at[n] < hi[b]: z[column, n] <- X, rest[column, n] <- E - made[n], both of row at[n].

    weights[n] <- S of dz_k = z[column - k, n] - X, 1 <= k <= filled[n], zero elsewhere; then filled[n] counts up.
    """
    ring = z.shape[0]
    for n, row in enumerate(at.tolist()):
        for b in range(states.shape[1]):
            if not int(lo[b]) <= row < int(hi[b]):
                continue
            x, count = states[row, b].double(), min(int(filled[n, b]), ring - 1)
            older = [(column - k) % ring for k in range(1, count + 1)]
            weights[n, b] = 0
            if count:
                weights[n, b, :count, :count] = fit(z[older, n, b].double() - x, x.norm(), ridge, floor)
            z[column, n, b] = states[row, b]
            rest[column, n, b] = (predictions[row, b].double() - made[n, b].double()).to(rest.dtype)
            filled[n, b] = count + 1
