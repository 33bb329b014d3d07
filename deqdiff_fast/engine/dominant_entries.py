"""A word where a few entries of a sample make nearly all of its norm, and so of what a tolerance means."""

from __future__ import annotations

import logging

from torch import Tensor

from .system import System

FEW, NEARLY_ALL = 0.02, 0.99  # of the entries, and of the squared norm
FEWEST_ENTRIES = 50

_log = logging.getLogger(__name__)


def warn_of_dominant_entries(system: System, sample: Tensor) -> None:
    """Log a warning where that is so for some sample of (B, *shape), in the norm of the system."""
    if system.numel < FEWEST_ENTRIES or len(sample) == 0:
        return
    rows = sample.detach().reshape(len(sample), -1).to(system.dtype)
    squares = system.to_basis(rows).square_()
    few = max(1, int(FEW * system.numel))
    part = float((squares.topk(few, dim=1).values.sum(1) / squares.sum(1)).max())
    if part > NEARLY_ALL:
        _log.warning(
            "%d of the %d entries of a sample make %.1f %% of its norm: errors of the others hardly count towards tol. "
            "Give DEQSampler(weight=...), zero for entries that nobody reads, or scale the data",
            few, system.numel, 100 * part,
        )  # fmt: skip
