"""The scratch memory of a pass of a draft along the chain."""

from __future__ import annotations

import torch

from .. import _config
from .._workspace import Layout, Size, ceil_div, nbytes, needs_none, next_power_of_2, wide


def layout(size: Size, ring: int) -> Layout:
    """What pieces leave for later ones: the dots of the secants with the next anchor's step, for this anchor and the
    next, and three squared norms of every row, all summed over blocks of D."""
    blocks = ceil_div(size.numel, _config.config("draft_scan", size.device).block(size.dtype.itemsize))
    pairs, real = next_power_of_2(max(ring - 1, 1)), wide(size.dtype)
    return {
        "dots": ((2, size.batch, blocks, pairs), real),
        "partials": ((size.steps, size.batch, blocks, 3), real),
    }


def draft_scan_bytes(
    steps: int, batch: int, numel: int, history: int, dtype: torch.dtype, device: torch.device, backend: str = "auto"
) -> int:
    """Bytes of the `workspace` of `draft_scan` for states (steps + 1, batch, numel) of `dtype` and rings of
    history + 1 columns."""
    if needs_none(device, backend):
        return 0
    return nbytes(layout(Size(steps, batch, numel, 1, dtype, device), history + 1))
