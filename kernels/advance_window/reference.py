"""Reference of the window's move: which rows are final after a round, where the window goes, what is evaluated next."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..stopping import TINY_OF


def advance_window(
    sq_diff: Tensor, sq_norm: Tensor, lo: Tensor, hi: Tensor, previous_bounds: Tensor, decision: Tensor, rows: Tensor,
    freeze: float, finish: float, width: int,
) -> None:  # fmt: skip
    """Row lo is final, and the rows up to the first of residual > freeze; all where none is > finish.

    lo, hi <- the next window. previous_bounds (2, B): the old lo; the first row that enters. decision (4, B): lo, hi,
    the first row whose residual is not finite (T: none), the largest residual. rows (N,): the active rows i * B + b,
    then T * B. No host sync.
    """
    steps, batch = sq_diff.shape
    step = torch.arange(steps, device=lo.device)[:, None]
    active = (step >= lo) & (step < hi)
    residual = torch.where(active, (sq_diff / sq_norm.clamp_min(TINY_OF[sq_norm.dtype])).sqrt(), 0)
    bad = ~residual.isfinite()
    residual = torch.where(active & (bad.cumsum(0) > 0), math.inf, residual)
    # the first row where `flags` holds, or T
    first = lambda flags: torch.where(flags, step, steps).amin(0)  # noqa: E731
    front = torch.minimum(torch.maximum(first(active & ~(residual <= freeze)), lo + 1), hi)
    coarse = first(active & ~(residual <= finish))
    front = torch.where((hi == steps) & (coarse == steps), steps, front).to(lo.dtype)
    previous_bounds[0].copy_(lo)
    torch.maximum(hi, front, out=previous_bounds[1])
    lo.copy_(torch.where(lo < steps, front, lo))
    hi.copy_((lo + width).clamp_max(steps))
    for target, value in zip(decision, (lo, hi, first(bad), residual.amax(0))):
        target.copy_(value)
    active = ((step >= lo) & (step < hi)).flatten()
    position = torch.where(active, active.cumsum(0) - 1, len(rows))  # rows that are not active go to a spare place
    listed = rows.new_full((len(rows) + 1,), steps * batch)
    listed.scatter_(0, position, torch.arange(steps * batch, device=lo.device))
    listed[-1] = steps * batch
    rows.copy_(listed[:-1])
