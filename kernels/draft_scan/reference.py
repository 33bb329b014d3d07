"""Reference of a segment of a draft's sweep: an anchor's correction and the states that follow it, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_OUTPUT = 1e6  # a draft's output beyond this, or NaN, is replaced by what is right for unit Gaussian data


def secant_change(z: Tensor, remainder: Tensor, secant_weights: Tensor, column: int, dx: Tensor) -> Tensor:
    """dR^T secant_weights dZ dx with dZ = z[column - k] - z[column], k >= 1; dR: of remainder. Rings: (H + 1, D)."""
    use, older = secant_weights.diagonal()[:, None] != 0, [column - k for k in range(1, len(z))]
    dz, dr = (torch.where(use, ring[older].double() - ring[column].double(), 0) for ring in (z, remainder))
    return (secant_weights.double() @ (dz @ dx)) @ dr


def draft_scan(
    states, predictions, draft_output, draft_cache, correction, weights, state_coef, model_coef, slope, lo, hi,
    sq_diff, sq_norm, carry, z, remainder, secant_weights, column, anchor, previous_start, start, stop, rollout=False,
    last=True, drift=None,
) -> None:  # fmt: skip
    """Rows max(start, lo[b]) <= i < min(stop, hi[b]): N[i+1] = sum_l a[i,l] N[i-l] + b[i,l] Ê[i-l] + drift[i], with
    Ê[i] = E[i] + c[i] (N[i] - X[i]) + weights[i] . correction[n-1, n], n = anchor that of row start.

    correction[n] = draft_output - draft_cache[n] + (S - c) (N - X), S: `secant_change`; draft_cache[n] <-
    draft_output. Zero where row start is not active, and in row lo[b], whose state is final: there the model's own
    prediction stands. rollout: E, X, draft_cache and S are zero, and before lo[b] the prediction is the draft's output.
    """
    lags, f, hats, slot = state_coef.shape[1], *carry, anchor % 2
    for b in range(states.shape[1]):
        low, high, now, c = int(lo[b]), int(hi[b]), states[start, b].double(), slope[start].double()
        correction[slot, b] = 0
        if low <= start < high:
            sanitized = torch.where(draft_output[b].abs() < MAX_OUTPUT, draft_output[b].double(), c * now)
            dx = now - (0 if rollout else z[column, anchor, b].double())
            change = sanitized - c * dx
            if not rollout:
                change += secant_change(z[:, anchor, b], remainder[:, anchor, b], secant_weights[anchor, b], column, dx)
                change -= draft_cache[anchor, b].double()
            correction[slot, b] = change.to(correction.dtype) if rollout or start > low else 0
            draft_cache[anchor, b] = sanitized.to(draft_cache.dtype)
        elif rollout and start < low:
            correction[slot, b] = (predictions[start, b].double() - c * now).to(correction.dtype)
        before = correction[1 - slot, b].double() if previous_start >= (0 if rollout else low) else 0
        x = z[column, anchor, b].double() if start > low and not rollout else states[max(start, low), b].double()
        for i in range(max(start, low), min(stop, high)):
            old, e, c = states[i + 1, b].to(torch.float64, copy=True), predictions[i, b].double(), slope[i].double()
            extra = weights[i, 0].double() * before + weights[i, 1].double() * correction[slot, b].double()
            hats[i % lags, b] = c * states[i, b].double() + extra + (0 if rollout else e - c * x)
            new = plain = torch.zeros_like(e) if drift is None else drift[i, b].double()
            for j in range(i, max(i - lags, -1), -1):
                a, m = state_coef[i, i - j].double(), model_coef[i, i - j].double()
                new = new + a * states[j, b].double() + m * (hats[j % lags, b] if j >= low else predictions[j, b])
                plain = plain + a * (f[j % lags, b] if j > low else states[j, b]) + m * predictions[j, b].double()
            f[(i + 1) % lags, b], states[i + 1, b], x = plain, new.to(states.dtype), old
            if not rollout:
                sq_diff[i, b] = torch.maximum((new - old).square().sum(), (plain - old).square().sum())
                sq_norm[i, b] = new.square().sum()
