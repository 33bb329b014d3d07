"""Scratch memory of the Triton kernels: what an op needs, and how it is cut out of memory that the caller owns.

An op that is given a `workspace` allocates nothing. Two calls may share one as long as the second is queued on the
stream of the first; nothing in it outlives a call. The C++ and reference backends need none.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

ALIGNMENT = 256
Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]


class ProblemSize(NamedTuple):
    """What the scratch of an op depends on."""

    steps: int
    batch: int
    numel: int
    lags: int
    dtype: torch.dtype  # of the states
    device: torch.device


def wide(dtype: torch.dtype) -> torch.dtype:
    """What the Triton kernels compute in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _rounded(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return ceil_div(math.prod(shape) * dtype.itemsize, ALIGNMENT) * ALIGNMENT


def nbytes(layout: Layout) -> int:
    """Bytes of a workspace that holds these tensors, each aligned."""
    return sum(_rounded(*entry) for entry in layout.values())


def needs_none(device: torch.device, backend: str) -> bool:
    """Whether the backend that serves such tensors works without a workspace."""
    return backend in ("reference", "cpp") or (backend == "auto" and device.type != "cuda")


def cut(layout: Layout, workspace: Tensor | None, device: torch.device) -> dict[str, Tensor]:
    """The tensors of a layout, uninitialised: from `workspace`, or where there is none from torch's allocator."""
    if workspace is None:
        return {name: torch.empty(shape, dtype=dtype, device=device) for name, (shape, dtype) in layout.items()}
    if workspace.numel() < nbytes(layout):
        raise ValueError(f"workspace: expected at least {nbytes(layout)} bytes, got {workspace.numel()}")
    found, start = {}, 0
    for name, (shape, dtype) in layout.items():
        part = workspace[start : start + math.prod(shape) * dtype.itemsize]
        found[name] = part.view(dtype).view(shape)
        start += _rounded(shape, dtype)
    return found
