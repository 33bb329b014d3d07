"""A word where a few entries of a sample make nearly all of its norm, and so of what a tolerance means."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from ..model.weighted_norm import WeightedNorm

FEW, NEARLY_ALL = 0.02, 0.99  # of the entries, and of the squared norm
FEWEST_ENTRIES = 50

_log = logging.getLogger(__name__)


def warn_of_dominant_entries(sample: Tensor, norm: WeightedNorm | None) -> None:
    """Log a warning where that is so for some sample of (B, *shape), in that norm, None for L2."""
    size = sample[:1].numel()
    if size < FEWEST_ENTRIES:
        return
    rows = sample.detach().flatten(1).to(torch.promote_types(sample.dtype, torch.float32), copy=True)
    squares = (rows if norm is None else norm.forward(rows)).square_()
    few = max(1, int(FEW * size))
    part = float((squares.topk(few, dim=1).values.sum(1) / squares.sum(1)).max())
    if part > NEARLY_ALL:
        _log.warning(
            "%d of the %d entries of a sample make %.1f %% of its norm: errors of the others hardly count towards tol. "
            "Give DEQSampler(weight=...), zero for entries that nobody reads, or scale the data",
            few, size, 100 * part,
        )  # fmt: skip
