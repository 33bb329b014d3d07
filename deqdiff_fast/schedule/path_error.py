"""How far the steps of a chain leave the path of one data point: the check of every coefficient table."""

from __future__ import annotations

import torch
from torch import Tensor


def path_error(
    signal: Tensor, sigma: Tensor, state_coef: Tensor, model_coef: Tensor, noise_coef: Tensor, denoised_coef: Tensor
) -> Tensor:
    """(T,) float64: how far each step leaves the path of one data point, relative to the state's size.

    If the model is exact for a single data point x0, the step must map signal_i x0 + sigma_i eps to
    signal_{i+1} x0 + sigma_{i+1} eps: exactly when the chain is deterministic. With noise, the x0 part exactly and
    the variance of the rest: (deterministic part)^2 + noise_coef^2 = sigma_{i+1}^2, checked for L = 1. Steps that
    use an output which does not enter x0 (q = 0) are not checked. Arguments: as the fields of `Schedule`.
    """
    p, q = denoised_coef.unbind(1)
    after = []
    for x0, eps in ((1.0, 0.0), (0.0, 1.0)):
        x = signal * x0 + sigma * eps
        after.append(_steps(state_coef, model_coef, x, torch.where(q != 0, (x0 - p * x[:-1]) / q, 0)))
    worst = (after[0] - signal[1:]).abs()
    if not bool((noise_coef != 0).any()):
        worst = torch.maximum(worst, (after[1] - sigma[1:]).abs())
    elif state_coef.shape[1] == 1:
        worst = torch.maximum(worst, (torch.hypot(after[1], noise_coef) - sigma[1:]).abs())
    unknown = _steps(torch.zeros_like(state_coef), model_coef, signal, (q == 0).to(q.dtype)) != 0
    return torch.where(unknown, 0, worst / torch.hypot(signal, sigma)[1:])


def _steps(state_coef: Tensor, model_coef: Tensor, x: Tensor, o: Tensor) -> Tensor:
    """Every step on its own, from given (T+1,) states and (T,) outputs, without noise."""
    count, out = len(o), torch.zeros_like(o)
    for lag in range(min(state_coef.shape[1], count)):
        out[lag:] += state_coef[lag:, lag] * x[: count - lag] + model_coef[lag:, lag] * o[: count - lag]
    return out
