"""The scratch memory of the batched DDIM update."""

from __future__ import annotations

import torch

from .. import _config
from .._workspace import Layout, Size, ceil_div, nbytes, needs_none, wide


def layout(size: Size) -> Layout:
    """Squared norms of every row, summed over blocks of D."""
    blocks = ceil_div(size.numel, _config.config("scan", size.device).block(size.dtype.itemsize))
    return {"partials": ((size.steps, size.batch, blocks, 2), wide(size.dtype))}


def ddim_update_bytes(
    steps: int, batch: int, numel: int, dtype: torch.dtype, device: torch.device, backend: str = "auto"
) -> int:
    """Bytes of the `workspace` with which `ddim_update` allocates nothing, for states (steps + 1, batch, numel)."""
    return 0 if needs_none(device, backend) else nbytes(layout(Size(steps, batch, numel, 1, dtype, device)))
