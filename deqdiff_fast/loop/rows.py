"""Rows of many samples at once: rings over timesteps, and bounds that only a device knows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..kernels import copy_rows
from .base import Bounds, Chain


def ring_rows(old: list[int], new: list[int], width: int) -> Iterator[tuple[int, slice, slice]]:
    """(sample, rows, slots) for rows old[b] <= i < new[b], cut where the ring of `width` slots wraps around."""
    for b, (start, stop) in enumerate(zip(old, new)):
        while start < stop:
            end = min(stop, start + width - start % width)
            yield b, slice(start, end), slice(start % width, start % width + end - start)
            start = end


def move_rows(target: Tensor, ring: Tensor, old: Bounds, new: Bounds, backend: str) -> None:
    """target[i, b] <- ring[i % S, b] for rows old[b] <= i < new[b]; target: (R, B, D), ring: (S, B, D)."""
    if isinstance(old, Tensor) and isinstance(new, Tensor):
        copy_rows(target, ring, old, new, backend=backend)
        return
    assert isinstance(old, list)
    assert isinstance(new, list)
    for b, rows, slots in ring_rows(old, new, ring.shape[0]):
        target[rows, b].copy_(ring[slots, b])


def row_numbers(row: Tensor, batch: int) -> Tensor:
    """row[b] * B + b: where row[b] of sample b is found in a time-major tensor flattened to (rows * B, D)."""
    return row.long() * batch + torch.arange(batch, device=row.device)


def repeat_rows(chain: Chain, old: Bounds, new: Bounds) -> None:
    """States old[b] < i <= new[b] become copies of state old[b]."""
    if isinstance(old, Tensor) and isinstance(new, Tensor):
        out = None if chain.window_scratch is None else chain.window_scratch[0]
        last = torch.index_select(chain.states.flatten(0, 1), 0, row_numbers(old, chain.batch), out=out)
        copy_rows(chain.states[1:], last[None], old, new, backend=chain.backend)
        return
    assert isinstance(old, list)
    assert isinstance(new, list)
    for b, (start, stop) in enumerate(zip(old, new)):
        chain.states[start + 1 : stop + 1, b] = chain.states[start, b]


def clear_rows(filled: Tensor, old: Bounds, new: Bounds) -> None:
    """filled[i % W, b] <- 0 for rows old[b] <= i < new[b]; filled: (W, B)."""
    if isinstance(old, Tensor) and isinstance(new, Tensor):
        slots = torch.arange(filled.shape[0], device=filled.device)[:, None]
        filled.masked_fill_((slots - old).remainder(filled.shape[0]) < new - old, 0)
        return
    assert isinstance(old, list)
    assert isinstance(new, list)
    for b, _, used in ring_rows(old, new, filled.shape[0]):
        filled[used, b] = 0
