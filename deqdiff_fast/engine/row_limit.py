"""How many rows one model call may have."""

from __future__ import annotations

import math

from torch import Tensor

CPU_ROWS, CPU_ELEMENTS = 64, 1 << 18  # on a CPU more rows only push the activations out of the cache


def row_limit(max_batch: int | None, samples: Tensor) -> int | None:
    """Most rows in one model call: `max_batch` if given, else none on a GPU and CPU_ELEMENTS, but at least CPU_ROWS
    rows, on a CPU. samples: (B, *shape), any B."""
    if max_batch is None and samples.device.type == "cpu":
        return max(CPU_ROWS, CPU_ELEMENTS // max(math.prod(samples.shape[1:]), 1))
    return max_batch
