"""Reference of the copy of rows between device-held bounds, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def copy_rows(target: Tensor, source: Tensor, first: Tensor, last: Tensor) -> None:
    """target[i, b] = source[i % S, b] for first[b] <= i < last[b]. No host sync."""
    step = torch.arange(target.shape[0], device=target.device)
    chosen = (step[:, None] >= first) & (step[:, None] < last)
    ring = source[step % source.shape[0]].to(target.dtype)
    target.copy_(torch.where(chosen[..., None], ring, target))
