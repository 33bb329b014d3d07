"""Trajectories to start from, and states for rows that enter a window: the chain of a linear model, no model call."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..kernels import copy_rows, newton_scan

if TYPE_CHECKING:
    from ..loop.base import Bounds, Chain


def gaussian_guess(chain: Chain, linear: Tensor) -> None:
    """Fill states 1..T with the chain of Gaussian data, whose best model is linear: E[i] = linear[i] X[i].

    linear: (T, 1) or (T, D), the slope of the prediction in the state.
    """
    chain.predictions.zero_()
    linear_scan(chain, linear, torch.zeros_like(chain.lo), torch.full_like(chain.hi, chain.num_steps))


def extrapolate(chain: Chain, linear: Tensor, old: Bounds, new: Bounds) -> None:
    """Fill states old[b] < i <= new[b], which enter a window: the nonlinear part of a prediction stays as it is."""
    if isinstance(old, Tensor) and isinstance(new, Tensor):
        rest = _nonlinear_part(chain, linear, old)
        copy_rows(chain.predictions, rest[None], old, new, backend=chain.backend)
        linear_scan(chain, linear, old, new)
        return
    assert isinstance(old, list)
    assert isinstance(new, list)
    for b, (start, stop) in enumerate(zip(old, new)):
        if start < stop:
            known = max(start - 1, 0)
            row = chain.predictions[known, b] - linear[known] * chain.states[known, b]
            chain.predictions[start:stop, b] = row if start > 0 else 0
    lo = torch.tensor(old, dtype=torch.int32, device=linear.device)
    linear_scan(chain, linear, lo, torch.tensor(new, dtype=torch.int32, device=linear.device))


def _nonlinear_part(chain: Chain, linear: Tensor, old: Tensor) -> Tensor:
    """(B, D): E - linear X of the last row before old[b], zero where there is none; in `chain.window_scratch` if there is one."""
    last = (old - 1).clamp_min(0).long()
    row = last * chain.batch + torch.arange(chain.batch, device=old.device)
    edge = (None, None, None) if chain.window_scratch is None else chain.window_scratch.unbind(0)
    rest = torch.index_select(chain.predictions.flatten(0, 1), 0, row, out=edge[0])
    states = torch.index_select(chain.states.flatten(0, 1), 0, row, out=edge[1])
    slope = torch.index_select(linear, 0, last, out=edge[2] if linear.shape[1] > 1 else None)
    return rest.sub_(states.mul_(slope)).masked_fill_((old == 0)[:, None], 0.0)


def linear_scan(chain: Chain, linear: Tensor, lo: Tensor, hi: Tensor) -> None:
    """States lo[b] < i <= hi[b] <- the chain whose predictions are E[i] + linear[i] X[i], exactly."""
    newton_scan(
        chain.states, chain.predictions, chain.state_coef, chain.model_coef, linear, lo, hi, chain.sq_diff,
        chain.sq_norm, drift=chain.drift, workspace=chain.scratch, backend=chain.backend,
    )  # fmt: skip
