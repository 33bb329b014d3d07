"""How many rows one model call may have."""

from __future__ import annotations

import math

from torch import Tensor

from ..ranks.group import Ranks

CPU_ROWS, CPU_ELEMENTS = 64, 1 << 18  # on a CPU more rows only push the activations out of the cache


def row_limit(max_batch: int | None, samples: Tensor, ranks: Ranks | None = None) -> int | None:
    """Most rows in one model call: `max_batch` if given, else none on a GPU and CPU_ELEMENTS, but at least CPU_ROWS
    rows, on a CPU; as many times that as there are ranks to share them. samples: (B, *shape), any B."""
    if max_batch is None and samples.device.type == "cpu":
        max_batch = max(CPU_ROWS, CPU_ELEMENTS // max(math.prod(samples.shape[1:]), 1))
    return max_batch if max_batch is None or ranks is None else max_batch * ranks.size
