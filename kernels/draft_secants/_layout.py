"""The scratch memory of the secants of a draft's remainder."""

from __future__ import annotations

import torch

from .. import _config
from .._workspace import Layout, Size, ceil_div, nbytes, needs_none, next_power_of_2, wide


def layout(size: Size, ring: int) -> Layout:
    """Grams of the anchors (`size.steps` of them) and the squared size of their states, summed over blocks of D."""
    blocks = ceil_div(size.numel, _config.config("draft_secants", size.device).block(size.dtype.itemsize))
    pairs = next_power_of_2(max(ring - 1, 1))
    return {"partials": ((size.steps, size.batch, blocks, pairs**2 + 1), wide(size.dtype))}


def draft_secants_bytes(
    anchors: int, batch: int, numel: int, history: int, dtype: torch.dtype, device: torch.device, backend: str = "auto"
) -> int:
    """Bytes of the `workspace` with which `draft_secants` allocates nothing, for rings (history + 1, anchors, batch,
    numel) of `dtype`."""
    if needs_none(device, backend):
        return 0
    return nbytes(layout(Size(anchors, batch, numel, 1, dtype, device), history + 1))
