"""What a slab will hold, and where in it."""

from __future__ import annotations

import math

import torch

ALIGNMENT = 256
_ADDRESSABLE = 1 << 62


class MemoryPlan:
    """Named tensors that will live in one slab, each aligned to 256 bytes."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}

    def add(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> MemoryPlan:
        """Plan a tensor.

        Returns:
            The plan itself.

        Raises:
            ValueError: a repeated name, or a negative size.
        """
        if name in self._entries:
            raise ValueError(f"name: {name!r} is already in the plan; every tensor needs its own name")
        shape = tuple(int(size) for size in shape)
        if any(size < 0 for size in shape):
            raise ValueError(f"shape: expected sizes >= 0 for {name!r}, got {shape}")
        self._entries[name] = (shape, dtype)
        return self

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def entries(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """{name: (shape, dtype)} in the order of addition."""
        return dict(self._entries)

    def layout(self) -> tuple[dict[str, int], int]:
        """({name: offset in bytes}, total bytes), multiples of 256. Raises OverflowError past the address space."""
        offsets, total = {}, 0
        for name, (shape, dtype) in self._entries.items():
            offsets[name] = total
            total += -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
            if total > _ADDRESSABLE:
                raise OverflowError(f"plan: {name!r} does not fit the address space")
        return offsets, total
