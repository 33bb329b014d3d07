"""The stopping rule's constants.

`mark_converged` decides about rows, `advance_window` about windows and samples. The C++ form repeats the constants and
the Triton kernels take them from here; tests/kernels/test_stopping_rule.py holds all forms together.
"""

from __future__ import annotations

import torch

TINY = 1e-280  # of float64, keeps 0 / 0 a zero residual; Inf / Inf and NaN stay NaN, and no step over it overflows
TINY_OF = {torch.float64: TINY, torch.float32: 1e-30}  # by the dtype of the squares
MIN_RATE, MAX_RATE = 0.1, 0.9  # bounds of a row's contraction rate
FIRST_RATE = 0.5  # the rate of a row that has moved once
