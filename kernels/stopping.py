"""The stopping rule's constants and its formula for whole samples, in plain torch.

`mark_converged` decides about rows, `advance_window` about windows and samples. The C++ form repeats the constants and
the Triton kernels take them from here; tests/kernels/test_stopping_rule.py holds all forms together.
"""

from __future__ import annotations

import torch
from torch import Tensor

TINY = 1e-280  # of float64, keeps 0 / 0 a zero residual; Inf / Inf and NaN stay NaN, and no step over it overflows
TINY_OF = {torch.float64: TINY, torch.float32: 1e-30}  # by the dtype of the squares
MIN_RATE, MAX_RATE = 0.1, 0.9  # bounds of a row's contraction rate
FIRST_RATE = 0.5  # the rate of a row that has moved once


def finish_threshold(previous: Tensor, finish: float, reach: float, allowed: float) -> Tensor:
    """The largest residual r at which a sample may end, given that of the round before, p.

    r <= finish, or r <= reach and r rho / (1 - rho) <= allowed with rho = r / p (Aitken's extrapolation), which
    is r^2 + allowed r <= allowed p. A p that is 0 or not finite says nothing.

    Args:
        previous: (B,), p.
        finish, reach, allowed: as for `advance_window`.

    Returns:
        (B,) thresholds.
    """
    known = previous.isfinite() & (previous > 0)
    root = ((allowed**2 + 4 * allowed * torch.where(known, previous, 0)).sqrt() - allowed) / 2
    return root.clamp_max(reach).clamp_min(finish)
