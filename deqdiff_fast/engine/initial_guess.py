"""Trajectories to start from, and states for rows that enter a window: the chain of a linear model, no model call."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import copy_rows, newton_scan
from ..loop.base import Bounds, Chain


def gaussian_guess(chain: Chain, slope: Tensor) -> None:
    """Fill states 1..T with the chain of Gaussian data, whose best model is linear: E[i] = slope[i] X[i].

    slope: (T, 1) or (T, D), the slope of the prediction in the state.
    """
    chain.predictions.zero_()
    linear_scan(chain, slope, torch.zeros_like(chain.lo), torch.full_like(chain.hi, chain.num_steps))


def extrapolate(chain: Chain, slope: Tensor, old: Bounds, new: Bounds) -> None:
    """Fill states old[b] < i <= new[b], which enter a window: the nonlinear part of a prediction stays as it is."""
    if isinstance(old, Tensor) and isinstance(new, Tensor):
        remainder = _nonlinear_part(chain, slope, old)
        copy_rows(chain.predictions, remainder[None], old, new, backend=chain.backend)
        linear_scan(chain, slope, old, new)
        return
    assert isinstance(old, list)
    assert isinstance(new, list)
    for b, (start, stop) in enumerate(zip(old, new)):
        if start < stop:
            known = max(start - 1, 0)
            row = chain.predictions[known, b] - slope[known] * chain.states[known, b]
            chain.predictions[start:stop, b] = row if start > 0 else 0
    lo = torch.tensor(old, dtype=torch.int32, device=slope.device)
    linear_scan(chain, slope, lo, torch.tensor(new, dtype=torch.int32, device=slope.device))


def _nonlinear_part(chain: Chain, slope: Tensor, old: Tensor) -> Tensor:
    """(B, D): E - slope X of the last row before old[b], 0 where there is none; in `chain.window_scratch`, if any."""
    last = (old - 1).clamp_min(0).long()
    row = last * chain.batch + torch.arange(chain.batch, device=old.device)
    scratch = (None, None, None) if chain.window_scratch is None else chain.window_scratch.unbind(0)
    remainder = torch.index_select(chain.predictions.flatten(0, 1), 0, row, out=scratch[0])
    states = torch.index_select(chain.states.flatten(0, 1), 0, row, out=scratch[1])
    last_slope = torch.index_select(slope, 0, last, out=scratch[2] if slope.shape[1] > 1 else None)
    return remainder.sub_(states.mul_(last_slope)).masked_fill_((old == 0)[:, None], 0.0)


def linear_scan(chain: Chain, slope: Tensor, lo: Tensor, hi: Tensor) -> None:
    """States lo[b] < i <= hi[b] <- the chain whose predictions are E[i] + slope[i] X[i], exactly."""
    newton_scan(
        chain.states, chain.predictions, chain.state_coef, chain.model_coef, slope, lo, hi, chain.sq_diff,
        chain.sq_norm, drift=chain.drift, workspace=chain.scratch, backend=chain.backend,
    )  # fmt: skip
