"""Reference of the inverse scan (every step of a chain solved for its own state, from the last one), in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def secant_weights(dg: Tensor, rho: Tensor, keep: Tensor, ridge: float) -> Tensor:
    """gamma of the least squares fit rho ~ dg^T gamma on normalised columns. dg: (B, n, D), rho: (B, D) -> (B, n)."""
    norm = dg.norm(dim=2).clamp_min(1e-300)
    unit = torch.where(keep[..., None], dg / norm[..., None], 0)
    system = unit @ unit.mT + torch.diag_embed(torch.where(keep, ridge, 1.0).to(dg.dtype))
    gamma = torch.linalg.solve(system, (unit @ rho[..., None]))[..., 0] / norm
    return torch.where(keep & gamma.isfinite(), gamma, 0)


def inverse_scan(
    states, predictions, state_coef, model_coef, slope, weight, lo, hi, sq_miss, z, e, filled, column,
    damping=1.0, ridge=1e-6, stale=8.0, floor=1e-6, reach=1.0, drift=None,
) -> None:  # fmt: skip
    """N[i] = X[i] + dX gamma + damping (rho - dG gamma) / d, rho = N[i+1] - G[i], gamma = argmin |rho - dG gamma|.

    G[i] = sum_l a[i,l] X[i-l] + b[i,l] E[i-l] + drift[i], d = a[i,0] + b[i,0] slope[i]; columns of the rings z, e
    (H+1, W, B, D): dX = z - X, dG = a[i,0] dX + b[i,0] (e - E). sq_miss = |weight[i] (X[i+1] - G[i])|^2.
    """
    wide, start, device = torch.float64, states.to(torch.float64, copy=True), states.device
    new, back = start.clone(), torch.arange(1, z.shape[0], device=device)
    for i in reversed(range(int(lo.min()), int(hi.max()))):
        on, s, x, out = ((lo <= i) & (i < hi))[:, None], i % z.shape[1], start[i], predictions[i].to(wide)
        first, model = state_coef[i, 0].to(wide), model_coef[i, 0].to(wide)
        reached = torch.zeros_like(x) if drift is None else drift[i].to(wide)
        for lag in range(min(state_coef.shape[1], i + 1)):
            reached = reached + state_coef[i, lag] * start[i - lag] + model_coef[i, lag] * predictions[i - lag].to(wide)
        miss, rho = weight[i].to(wide) * (start[i + 1] - reached), new[i + 1] - reached
        sq_miss[i] = torch.where(on[:, 0], miss.square().sum(1).to(sq_miss.dtype), sq_miss[i])
        known, older = back <= filled[s][:, None], (column - back) % z.shape[0]
        dx = torch.where(known[..., None], z[older, s].to(wide).transpose(0, 1) - x[:, None], 0)
        de = torch.where(known[..., None], e[older, s].to(wide).transpose(0, 1) - out[:, None], 0)
        dg = first * dx + model * de
        size, far = dg.norm(dim=2), stale * rho.norm(dim=1, keepdim=True)  # neither rounding nor slopes from far away
        gamma = secant_weights(
            dg, rho, known & (size > floor * reached.norm(dim=1, keepdim=True)) & (size <= far), ridge
        )
        rest = (rho - (gamma[:, None] @ dg)[:, 0]) / (first + model * slope[i].to(wide))
        step = (gamma[:, None] @ dx)[:, 0] + damping * rest
        length, limit = step.norm(dim=1), reach * torch.maximum(x.norm(dim=1), new[i + 1].norm(dim=1))
        step = step * (limit / length).clamp(max=1)[:, None]
        new[i] = torch.where(on & step.isfinite().all(1, keepdim=True), x + step, x)
        z[column, s] = torch.where(on, x.to(z.dtype), z[column, s])
        e[column, s] = torch.where(on, predictions[i].to(e.dtype), e[column, s])
        filled[s] = torch.where(on[:, 0], filled[s].clamp(max=z.shape[0] - 1) + 1, filled[s])
        states[i] = torch.where(on, new[i].to(states.dtype), states[i])
