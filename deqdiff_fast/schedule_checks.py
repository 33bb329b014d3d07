"""What a schedule checks about its own tables."""

from __future__ import annotations

import torch
from torch import Tensor


def check_values(fields: dict[str, Tensor], lags: int) -> None:
    """Raises ValueError for tables of the right shape that no chain can have."""
    if lags < 1:
        raise ValueError("state_coef: expected at least one lag, got shape with L = 0")
    for name, value in fields.items():
        if not bool(value.isfinite().all()):
            where = [int(k) for k in (~value.isfinite()).nonzero()[0]]
            raise ValueError(f"{name}: expected finite values, got {value[tuple(where)].item()} at index {where}")
    early = torch.arange(len(fields["timesteps"]))[:, None] < torch.arange(lags)[None, :]
    for name in ("state_coef", "model_coef"):
        if bool((fields[name][early] != 0).any()):
            raise ValueError(f"{name}: expected zeros where i - l < 0 (there is no state before x_0)")
    for name in ("signal", "sigma"):
        if bool((fields[name] < 0).any()):
            raise ValueError(f"{name}: expected values >= 0, got {fields[name].min().item()}")
    if bool(((fields["signal"] == 0) & (fields["sigma"] == 0)).any()):
        raise ValueError("signal, sigma: expected at least one of the two to be positive at every index")
    if bool(((fields["noise_coef"] != 0) & ~fields["draws"]).any()):
        raise ValueError("draws: expected True wherever noise_coef is not zero")


def path_error(
    state_coef: Tensor, model_coef: Tensor, noise_coef: Tensor, signal: Tensor, sigma: Tensor, p: Tensor, q: Tensor
) -> Tensor:
    """(T,): see `Schedule.path_error`. p, q: (T,) of x0 = p x + q o."""
    after = []
    for x0, eps in ((1.0, 0.0), (0.0, 1.0)):
        x = signal * x0 + sigma * eps
        o = torch.where(q != 0, (x0 - p * x[:-1]) / q, 0)
        after.append(_rows(state_coef, model_coef, x, o))
    worst = (after[0] - signal[1:]).abs()
    if not bool((noise_coef != 0).any()):
        worst = torch.maximum(worst, (after[1] - sigma[1:]).abs())
    elif state_coef.shape[1] == 1:
        worst = torch.maximum(worst, (torch.hypot(after[1], noise_coef) - sigma[1:]).abs())
    unknown = _rows(torch.zeros_like(state_coef), model_coef.abs(), signal, (q == 0).to(signal.dtype)) > 0
    return torch.where(unknown, 0, worst / torch.hypot(signal, sigma)[1:])


def _rows(state_coef: Tensor, model_coef: Tensor, x: Tensor, o: Tensor) -> Tensor:
    """Every step on its own, from given (T+1,) states and (T,) outputs, without noise."""
    count, lags = state_coef.shape
    out = torch.zeros(count, dtype=x.dtype)
    for lag in range(min(lags, count)):
        out[lag:] += state_coef[lag:, lag] * x[: count - lag] + model_coef[lag:, lag] * o[: count - lag]
    return out
