"""The scratch memory of an Anderson round."""

from __future__ import annotations

import torch

from .. import _config
from .._workspace import Layout, Size, ceil_div, nbytes, needs_none, next_power_of_2, wide


def layout(size: Size, history: int, narrow: int) -> Layout:
    """The Gram rows and norms, summed over blocks of D, and the weights. narrow: bytes of the narrowest element of the
    history: 16-byte accesses for this one, more of them for the others."""
    blocks = ceil_div(size.numel, _config.config("anderson_scan", size.device).block(narrow))
    rows = (size.steps, size.batch)
    return {
        "partials": ((*rows, blocks, next_power_of_2(history + 2)), wide(size.dtype)),
        "alpha": ((*rows, history), wide(size.dtype)),
    }


def anderson_step_bytes(
    steps: int, batch: int, numel: int, history: int, dtype: torch.dtype, stored: torch.dtype, device: torch.device,
    backend: str = "auto",
) -> int:  # fmt: skip
    """Bytes of the `workspace` with which `anderson_step` allocates nothing, for states (steps + 1, batch, numel) of
    `dtype` and a history whose narrower half is kept in `stored`."""
    if needs_none(device, backend):
        return 0
    return nbytes(layout(Size(steps, batch, numel, 1, dtype, device), history, min(stored.itemsize, dtype.itemsize)))
