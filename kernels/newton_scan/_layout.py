"""The scratch memory of a quasi-Newton scan."""

from __future__ import annotations

import torch

from .. import _config
from .._workspace import Layout, Size, ceil_div, nbytes, needs_none, next_power_of_2, wide


def linear_layout(size: Size) -> Layout:
    """Without secants: three squared norms of every row, summed over blocks of D."""
    blocks = ceil_div(size.numel, _config.config("newton_linear", size.device).block(size.dtype.itemsize))
    return {"partials": ((size.steps, size.batch, blocks, 3), wide(size.dtype))}


def secant_layout(size: Size, ring: int, stored: torch.dtype, products: bool) -> Layout:
    """With secants of `ring` > 1 columns kept in `stored`: Grams summed over blocks, the inverse of every row, and the
    states that narrower rings cannot keep; by products, what _triton_products.py passes from launch to launch."""
    real = wide(size.dtype)
    blocks = ceil_div(size.numel, _config.config("newton_prepare", size.device).block(stored.itemsize))
    rows, pairs, entries = (size.steps, size.batch), next_power_of_2(ring - 1), next_power_of_2(ring)
    found: Layout = {
        "partials": ((*rows, blocks, pairs**2 + 2), real),
        "weights": ((*rows, pairs, pairs), torch.float64),
    }
    if size.lags > 1:
        found["e_hat"] = ((size.lags, size.batch, size.numel), real)
    if products:
        found["gains"] = ((size.steps + 1, size.numel), torch.float32)
        found["products"] = ((size.batch, size.steps, pairs, size.steps, entries), torch.float32)
        found["gamma"] = ((size.batch, size.steps, entries), torch.float32)
        found["norms"] = ((*rows, blocks, 3), torch.float32)
    elif stored != size.dtype:  # by products the states stay until their last use
        found["exact"] = ((*rows, size.numel), size.dtype)
    return found


def by_products(size: Size, ring: int) -> bool:
    """Whether the scan is made of products of all rows; see `_config.newton_products`."""
    pairs = next_power_of_2(ring - 1)
    return _config.newton_products(size.steps, size.batch, size.numel, pairs, size.lags, size.dtype)


def newton_scan_bytes(
    steps: int, batch: int, numel: int, history: int, lags: int, dtype: torch.dtype, stored: torch.dtype,
    device: torch.device, backend: str = "auto",
) -> int:  # fmt: skip
    """Bytes of the `workspace` with which `newton_scan` allocates nothing, for states (steps + 1, batch, numel) of
    `dtype`, coefficients of `lags` lags and rings of history + 1 columns kept in `stored`; history 0: no secants."""
    if needs_none(device, backend):
        return 0
    size = Size(steps, batch, numel, lags, dtype, device)
    if history == 0:
        return nbytes(linear_layout(size))
    return nbytes(secant_layout(size, history + 1, stored, by_products(size, history + 1)))
