"""Reference of the quasi-Newton scan (linearised predictions carried exactly through the chain), in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def secant_weights(dz: Tensor, dx: Tensor, size: Tensor, ridge: float, floor: float) -> Tensor:
    """gamma of the least squares fit dx ~ dz^T gamma on normalised columns. dz: (n, D), dx: (D,). Returns (n,)."""
    norm = dz.norm(dim=1)
    keep = norm > floor * size  # a step of rounding size says nothing about the slope
    unit = torch.where(keep[:, None], dz / norm.clamp_min(1e-300)[:, None], 0)
    system = unit @ unit.T + torch.diag(torch.where(keep, ridge, 1.0).to(dz.dtype))
    gamma = torch.linalg.solve(system, unit @ dx) / norm.clamp_min(1e-300)
    return torch.where(keep & gamma.isfinite(), gamma, 0)


def newton_scan(
    states, predictions, state_coef, model_coef, slope, lo, hi, sq_diff, sq_norm,
    z=None, e=None, filled=None, column=0, ridge=1e-6, floor=1e-5, drift=None,
) -> None:  # fmt: skip
    """N[i+1] = sum_l a[i,l] N[i-l] + b[i,l] Ê[i-l] + drift[i], Ê[i] = E[i] + J[i] (N[i] - X[i]); states <- N.

    J[i] = c + (dE - c dX) (dX^T dX + ridge)^-1 dX^T, c = slope[i] (T, 1 or D), columns: rings z, e (H+1, W, B, D).
    sq_diff = max(|N - X|^2, |F - X|^2), F the plain step. Without rings X counts as zero: the scan of a linear model.
    """
    wide, n_lags, start = torch.float64, state_coef.shape[1], states.to(torch.float64, copy=True)
    plain, new, e_hat = start.clone(), start.clone(), predictions.to(wide).clone()
    for b in range(states.shape[1]):
        for i in range(int(lo[b]), int(hi[b])):
            c, x, out = slope[i].to(wide), start[i, b], predictions[i, b].to(wide)
            if z is None:
                e_hat[i, b] = out + c * new[i, b]
            else:
                s, count = i % z.shape[1], min(int(filled[i % z.shape[1], b]), z.shape[0] - 1)
                older = [(column - k) % z.shape[0] for k in range(1, count + 1)]
                dx, dz, de = new[i, b] - x, z[older, s, b].to(wide) - x, e[older, s, b].to(wide) - out
                gamma = secant_weights(dz, dx, x.norm(), ridge, floor)
                e_hat[i, b] = out + c * dx + gamma @ (de - c * dz)
                z[column, s, b], e[column, s, b], filled[s, b] = x.to(z.dtype), predictions[i, b].to(e.dtype), count + 1
            new[i + 1, b], plain[i + 1, b] = 0, 0
            for lag in range(min(n_lags, i + 1)):
                new[i + 1, b] += state_coef[i, lag] * new[i - lag, b] + model_coef[i, lag] * e_hat[i - lag, b]
                plain[i + 1, b] += state_coef[i, lag] * plain[i - lag, b] + model_coef[i, lag] * predictions[i - lag, b]
            if drift is not None:
                new[i + 1, b], plain[i + 1, b] = new[i + 1, b] + drift[i, b], plain[i + 1, b] + drift[i, b]
            step, residual = new[i + 1, b] - start[i + 1, b], plain[i + 1, b] - start[i + 1, b]
            sq_diff[i, b] = torch.maximum(step.square().sum(), residual.square().sum())
            sq_norm[i, b] = new[i + 1, b].square().sum()
            states[i + 1, b] = new[i + 1, b].to(states.dtype)
