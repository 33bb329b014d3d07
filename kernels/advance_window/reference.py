"""Reference of the window's step: which rows are final after a round, where the window goes, what is evaluated next."""

from __future__ import annotations

import math

import torch
from torch import Tensor

TINY = 1e-30  # keeps 0 / 0 a zero residual; Inf / Inf and NaN stay NaN


def limit(previous: Tensor, finish: float, reach: float, left: float) -> Tensor:
    """(B,) the largest residual r at which a sample may end, given that of the round before, p.

    r <= finish, or r <= reach and r rho / (1 - rho) <= left with rho = r / p (Aitken): r^2 + left r <= left p. A p that
    is 0 or not finite says nothing.
    """
    known = previous.isfinite() & (previous > 0)
    root = ((left**2 + 4 * left * torch.where(known, previous, 0)).sqrt() - left) / 2
    return root.clamp_max(reach).clamp_min(finish)


def advance_window(
    sq_diff: Tensor, sq_norm: Tensor, lo: Tensor, hi: Tensor, was: Tensor, verdict: Tensor, rows: Tensor,
    freeze: float, finish: float, width: int, reach: float = 0.0, left: float = 0.0,
) -> None:  # fmt: skip
    """Row lo is final, and the rows up to the first of residual > freeze; all where none is > `limit`. No host sync.

    lo, hi <- the next window. was (2, B): the old lo; the first row that enters. verdict (4, B): lo, hi, the first row
    whose residual is not finite (T: none), the largest residual. rows (N,): the active rows i * B + b, then T * B.
    """
    steps, batch = sq_diff.shape
    step = torch.arange(steps, device=lo.device)[:, None]
    active = (step >= lo) & (step < hi)
    residual = torch.where(active, (sq_diff / sq_norm.clamp_min(TINY)).sqrt(), 0)
    bad = ~residual.isfinite()
    residual = torch.where(active & (bad.cumsum(0) > 0), math.inf, residual)
    # the first row where `flags` holds, or T
    first = lambda flags: torch.where(flags, step, steps).amin(0)  # noqa: E731
    front = torch.minimum(torch.maximum(first(active & ~(residual <= freeze)), lo + 1), hi)
    end = limit(verdict[3].to(residual.dtype), finish, reach, left)
    coarse = first(active & ~(residual <= end))
    front = torch.where((hi == steps) & (coarse == steps), steps, front).to(lo.dtype)
    was[0].copy_(lo)
    torch.maximum(hi, front, out=was[1])
    lo.copy_(torch.where(lo < steps, front, lo))
    hi.copy_((lo + width).clamp_max(steps))
    for target, value in zip(verdict, (lo, hi, first(bad), residual.amax(0))):
        target.copy_(value)
    active = ((step >= lo) & (step < hi)).flatten()
    position = torch.where(active, active.cumsum(0) - 1, len(rows))  # rows that are not active go to a spare place
    listed = rows.new_full((len(rows) + 1,), steps * batch)
    listed.scatter_(0, position, torch.arange(steps * batch, device=lo.device))
    listed[-1] = steps * batch
    rows.copy_(listed[:-1])
