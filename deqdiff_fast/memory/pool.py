"""Solver memory: everything a solve needs in one slab, planned before the first round and reused by later solves."""

from __future__ import annotations

import importlib
import logging
import math
import os
import threading
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ..errors import StaleLeaseError
from .host_arena import HostArena

logger = logging.getLogger("deqdiff_fast")

DEFAULT_BYTE_BUDGET = 1 << 30


def _arena_class() -> Any:
    """`_C.Arena`, or the Python arena where the extension is missing."""
    try:
        return importlib.import_module("deqdiff_fast._C").Arena
    except ImportError as error:
        logger.debug("solver memory without the C++ extension (%s)", error)
        return HostArena


class MemoryPlan:
    """Named tensors that will live in one slab, each aligned to 256 bytes."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}

    def add(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> MemoryPlan:
        """Plan a tensor; returns the plan. Raises ValueError on a repeated name or a negative size."""
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
        """({name: offset in bytes}, total bytes)."""
        sizes = [(name, math.prod(shape) * dtype.itemsize) for name, (shape, dtype) in self._entries.items()]
        offsets, total = _arena_class().plan(sizes)
        return dict(offsets), int(total)


class Lease:
    """A slab cut into the tensors of a plan: `lease[name]`. Contents are not initialised.

    After `release()` (or the end of a `with` block) `lease[name]` raises StaleLeaseError. Tensors taken before stay
    safe to touch: their memory goes to another lease only when the last of them is gone.
    """

    def __init__(self, memory: SolverMemory, plan: MemoryPlan, device: torch.device) -> None:
        self._entries = plan.entries()
        self._offsets, total = plan.layout()
        self._memory = memory
        self._lock = threading.Lock()
        self.nbytes = max(total, 1)
        self.device = device
        self._raw, slab, self.generation = memory._take(self.nbytes, device)
        self._slab: Tensor | None = slab

    @property
    def released(self) -> bool:
        return self._slab is None

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __getitem__(self, name: str) -> Tensor:
        """The tensor `name` of the plan, on the lease's memory. Raises StaleLeaseError after release, KeyError."""
        slab = self._slab
        if slab is None:
            raise StaleLeaseError(
                f"lease[{name!r}]: this lease (generation {self.generation}) was released; "
                "take a new one with SolverMemory.lease(plan, device)"
            )
        if name not in self._entries:
            raise KeyError(f"{name!r} is not in the plan; it has {', '.join(map(repr, self._entries)) or 'nothing'}")
        shape, dtype = self._entries[name]
        start, size = self._offsets[name], math.prod(shape) * dtype.itemsize
        if size == 0:
            return torch.empty(shape, dtype=dtype, device=self.device)
        return slab[start : start + size].view(dtype).view(shape)

    def get(self, name: str) -> Tensor | None:
        """The tensor `name`, or None where the plan has none of that name. Raises StaleLeaseError after release."""
        return self[name] if name in self._entries else None

    def release(self) -> None:
        """Give the slab back. Idempotent."""
        with self._lock:
            slab, raw = self._slab, self._raw
            self._slab = self._raw = None
        if slab is not None:
            self._memory._give_back(slab, raw)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def __del__(self) -> None:
        if getattr(self, "_slab", None) is not None:
            self.release()


class SolverMemory:
    """Slabs that solves lease. Thread safe: two leases never share memory.

    byte_budget: idle host memory kept for later leases, in bytes; slabs above it are freed, the oldest first. poison:
    fill slabs with NaN on lease and on release, to find reads of memory that nobody wrote. On CUDA a lease is one
    tensor from torch's own allocator, which does the caching (and sees it inside graph captures).
    """

    def __init__(self, byte_budget: int = DEFAULT_BYTE_BUDGET, *, poison: bool = False) -> None:
        if not isinstance(byte_budget, int) or byte_budget < 0:
            raise ValueError(f"byte_budget: expected an int >= 0, got {byte_budget!r}")
        self._arena = _arena_class()(byte_budget)
        self._lock = threading.Lock()
        self._device = {"device_bytes": 0, "device_high_water": 0, "device_leases": 0}
        self._poison = False
        self.set_poison(poison)

    def lease(self, plan: MemoryPlan, device: torch.device | str = "cpu") -> Lease:
        """Memory for the plan's tensors on `device`. Raises MemoryError (torch.OutOfMemoryError on CUDA)."""
        return Lease(self, plan, torch.device(device))

    def stats(self) -> dict[str, int]:
        """Host memory: bytes held (leased and idle), idle_bytes, high_water, leases granted, reuses among them, active
        leases. Device memory: device_bytes leased, device_high_water, device_leases granted."""
        with self._lock:
            return {**self._arena.stats(), **self._device}

    def set_poison(self, on: bool) -> None:
        """Switch the filling of slabs with NaN (bytes 0xFF) on or off."""
        self._poison = bool(on)
        self._arena.set_poison(self._poison)

    def trim(self) -> None:
        """Free all idle host memory."""
        self._arena.trim()

    def _take(self, nbytes: int, device: torch.device) -> tuple[Any, Tensor, int]:
        if device.type == "cpu":
            raw = self._arena.lease(nbytes)
            view = getattr(raw, "view", None)
            return raw, torch.frombuffer(raw if view is None else view(), dtype=torch.uint8), raw.generation
        slab = torch.empty(nbytes, dtype=torch.uint8, device=device)
        if self._poison:
            slab.fill_(0xFF)
        with self._lock:
            counts = self._device
            counts["device_leases"] += 1
            counts["device_bytes"] += nbytes
            counts["device_high_water"] = max(counts["device_high_water"], counts["device_bytes"])
            return None, slab, counts["device_leases"]

    def _give_back(self, slab: Tensor, raw: Any) -> None:
        if raw is not None:
            raw.release()
            return
        if self._poison:
            slab.fill_(0xFF)
        with self._lock:
            self._device["device_bytes"] -= slab.numel()


_default: SolverMemory | None = None
_default_lock = threading.Lock()


def default_memory() -> SolverMemory:
    """The pool that samplers share unless they are given one. DEQDIFF_FAST_POISON=1 turns its poison on."""
    global _default
    with _default_lock:
        if _default is None:
            _default = SolverMemory(poison=os.environ.get("DEQDIFF_FAST_POISON", "0") not in ("", "0"))
        return _default


def _after_fork() -> None:
    """A forked child gets its own locks and pool: another thread of the parent may have held the old ones."""
    global _default, _default_lock
    _default, _default_lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
