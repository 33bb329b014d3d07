"""Reference of one Anderson round (scan, residual, Gram row, ridge solve, mix), in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ddim_update.reference import ddim_update


def solve_alpha(gram: Tensor, ridge: float, relative: bool, stale: float) -> Tensor:
    """argmin |G alpha|^2 + ridge |alpha|^2 with sum alpha = 1. gram: (n, n), newest column last. Returns (n,)."""
    newest = gram[-1, -1]
    keep = torch.diagonal(gram) <= stale * newest  # a residual far above the newest carries no information
    keep[-1] = True
    scale = torch.diagonal(gram) if relative else torch.ones_like(newest).expand(len(gram))
    system = torch.where(keep[:, None] & keep, gram, 0) + torch.diag(torch.where(keep, ridge * scale, 1.0))
    alpha = torch.linalg.solve_ex(system, keep.to(gram.dtype)).result * keep
    alpha = alpha / alpha.sum()
    usable = newest > 0 and bool(alpha.isfinite().all())
    return alpha if usable else torch.eye(len(gram), dtype=gram.dtype, device=gram.device)[-1]


def anderson_step(
    states, predictions, state_coef, model_coef, lo, hi, sq_diff, sq_norm, f, g, gram, filled, column,
    scope="timestep", ridge=1e-3, relative_ridge=False, damping=1.0, stale=float("inf"), drift=None,
) -> None:  # fmt: skip
    """F = scan(E), G = F - X, X <- sum_j alpha_j (F_j - (1 - damping) G_j); row lo[b] takes the plain step X <- F."""
    (history, width), plain = f.shape[:2], states.clone()
    ddim_update(plain, predictions, state_coef, model_coef, lo, hi, sq_diff, sq_norm, drift)
    for b in range(states.shape[1]):
        rows, orders = range(int(lo[b]), int(hi[b])), {}
        for i in rows:
            s = i % width
            f[column, s, b], g[column, s, b] = plain[i + 1, b], plain[i + 1, b] - states[i + 1, b]
            filled[s, b] = min(history, int(filled[s, b]) + 1)
            orders[i] = [(column - k) % history for k in reversed(range(int(filled[s, b])))]
            dots = g[orders[i], s, b].to(gram.dtype) @ g[column, s, b].to(gram.dtype)
            gram[s, b, column, orders[i]], gram[s, b, orders[i], column] = dots, dots
        for i in rows:
            if i == rows[0]:  # every state before it is known: the plain step is final
                states[i + 1, b] = plain[i + 1, b]
                continue
            share = {"timestep": [i], "triangular": range(rows[0], i + 1), "trajectory": rows}[scope]
            order = min((orders[j] for j in share), key=len)
            total = sum(gram[j % width, b][order][:, order] for j in share)
            alpha = solve_alpha(total, ridge, relative_ridge, stale)
            past = f[order, i % width, b].to(gram.dtype)
            past[-1] = plain[i + 1, b]  # not rounded to the history's dtype
            states[i + 1, b] = (alpha @ (past - (1 - damping) * g[order, i % width, b].to(gram.dtype))).to(states.dtype)
