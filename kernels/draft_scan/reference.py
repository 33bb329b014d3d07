"""Reference of a piece of a draft's chain: an anchor's correction and the states that follow it, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

WILD = 1e6  # what a draft says beyond this, or NaN, is not believed: then what is right for unit Gaussian data


def secant_change(z: Tensor, rest: Tensor, weights: Tensor, column: int, dx: Tensor) -> Tensor:
    """dR^T weights dZ dx with dZ = z[column - k] - z[column], k >= 1, and dR likewise. z, rest: (H + 1, D)."""
    use, older = weights.diagonal()[:, None] != 0, [column - k for k in range(1, len(z))]
    dz, dr = (torch.where(use, ring[older].double() - ring[column].double(), 0) for ring in (z, rest))
    return (weights.double() @ (dz @ dx)) @ dr


def draft_scan(
    states, predictions, said, made, turn, shares, state_coef, model_coef, slope, lo, hi, sq_diff, sq_norm, carry,
    z, rest, weights, column, number, previous, start, stop, charting=False, last=True, drift=None,
) -> None:  # fmt: skip
    """Rows max(start, lo[b]) <= i < min(stop, hi[b]): N[i+1] = sum_l a[i,l] N[i-l] + b[i,l] Ê[i-l] + drift[i], with
    Ê[i] = E[i] + c[i] (N[i] - X[i]) + shares[i,0] turn[n-1] + shares[i,1] turn[n], n = number the anchor of row start.

    turn[n] = said - made[n] + (S - c) (N - X), S: `secant_change`; made[n] <- said. Zero where row start is not active,
    and in row lo[b], whose state is final: there the model's own prediction stands.
    charting: E, X, made and S are zero, and before lo[b] the model's prediction is what was said.
    """
    lags, f, hats, slot = state_coef.shape[1], *carry, number % 2
    for b in range(states.shape[1]):
        low, high, now, c = int(lo[b]), int(hi[b]), states[start, b].double(), slope[start].double()
        turn[slot, b] = 0
        if low <= start < high:
            heard = torch.where(said[b].abs() < WILD, said[b].double(), c * now)
            dx = now - (0 if charting else z[column, number, b].double())
            change = heard - c * dx
            if not charting:
                change += secant_change(z[:, number, b], rest[:, number, b], weights[number, b], column, dx)
                change -= made[number, b].double()
            turn[slot, b] = change.to(turn.dtype) if charting or start > low else 0
            made[number, b] = heard.to(made.dtype)
        elif charting and start < low:
            turn[slot, b] = (predictions[start, b].double() - c * now).to(turn.dtype)
        near = [turn[1 - slot, b].double() if previous >= (0 if charting else low) else 0, turn[slot, b].double()]
        x = z[column, number, b].double() if start > low and not charting else states[max(start, low), b].double()
        for i in range(max(start, low), min(stop, high)):
            old, e, c = states[i + 1, b].to(torch.float64, copy=True), predictions[i, b].double(), slope[i].double()
            extra = shares[i, 0].double() * near[0] + shares[i, 1].double() * near[1]
            hats[i % lags, b] = c * states[i, b].double() + extra + (0 if charting else e - c * x)
            new = plain = torch.zeros_like(e) if drift is None else drift[i, b].double()
            for j in range(i, max(i - lags, -1), -1):
                a, m = state_coef[i, i - j].double(), model_coef[i, i - j].double()
                new = new + a * states[j, b].double() + m * (hats[j % lags, b] if j >= low else predictions[j, b])
                plain = plain + a * (f[j % lags, b] if j > low else states[j, b]) + m * predictions[j, b].double()
            f[(i + 1) % lags, b], states[i + 1, b], x = plain, new.to(states.dtype), old
            if not charting:
                sq_diff[i, b] = torch.maximum((new - old).square().sum(), (plain - old).square().sum())
                sq_norm[i, b] = new.square().sum()
