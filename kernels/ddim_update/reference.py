"""Reference of the batched DDIM update across timesteps (an affine scan), in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def ddim_update(
    states: Tensor, predictions: Tensor, state_coef: Tensor, model_coef: Tensor, lo: Tensor, hi: Tensor,
    sq_diff: Tensor, sq_norm: Tensor, drift: Tensor | None = None,
) -> None:  # fmt: skip
    """F[i+1] = sum_l state_coef[i,l] F[i-l] + model_coef[i,l] E[i-l] + drift[i] for lo[b] <= i < hi[b]; states <- F.

    Rows up to lo[b] are known, F = X there. sq_diff[i] = |F[i+1] - X[i+1]|^2, sq_norm[i] = |F[i+1]|^2, summed over D.
    """
    wide = torch.float64 if states.dtype == torch.float64 else torch.float32
    for b in range(states.shape[1]):
        for i in range(int(lo[b]), int(hi[b])):
            new = torch.zeros_like(states[0, b], dtype=wide)
            for lag in range(min(state_coef.shape[1], i + 1)):
                new += state_coef[i, lag].to(wide) * states[i - lag, b].to(wide)
                new += model_coef[i, lag].to(wide) * predictions[i - lag, b].to(wide)
            if drift is not None:
                new += drift[i, b].to(wide)
            sq_diff[i, b] = (new - states[i + 1, b].to(wide)).square().sum()
            sq_norm[i, b] = new.square().sum()
            states[i + 1, b] = new.to(states.dtype)
