"""Leases of slabs: from the C++ arena on the CPU, from torch's allocator elsewhere and without the extension."""

from __future__ import annotations

import importlib
import logging
import math
import os
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from .._locks import Lock
from ..errors import StaleLeaseError
from .plan import ALIGNMENT, MemoryPlan

logger = logging.getLogger("deqdiff_fast")

DEFAULT_BYTE_BUDGET = 1 << 30
_HOST_COUNTERS = ("bytes", "idle_bytes", "high_water", "leases", "reuses", "active")
_DEVICE_COUNTERS = ("device_bytes", "device_high_water", "device_leases")


def _arena_class() -> Any:
    """`_C.Arena`, or None where the extension is missing: host memory is then torch's, too."""
    try:
        return importlib.import_module("deqdiff_fast._C").Arena
    except ImportError as error:
        logger.debug("solver memory without the C++ extension (%s)", error)
        return None


class Lease:
    """A slab cut into the tensors of a plan: `lease[name]`. Contents are not initialised.

    After `release()` (or the end of a `with` block) `lease[name]` raises StaleLeaseError. Tensors taken before stay
    safe to touch: their memory goes to another lease only when the last of them is gone.
    """

    def __init__(self, memory: SolverMemory, plan: MemoryPlan, device: torch.device, pinned: bool = False) -> None:
        self._entries = plan.entries()
        self._offsets, total = plan.layout()
        self._memory = memory
        self.nbytes = max(total, 1)
        self.device = device
        self._arena_lease, slab, self.generation = memory._take(self.nbytes, device, pinned)
        self._slab: Tensor | None = slab

    @property
    def released(self) -> bool:
        """Whether the slab was given back."""
        return self._slab is None

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __getitem__(self, name: str) -> Tensor:
        """The tensor `name` of the plan, a view of the slab.

        Raises:
            StaleLeaseError: the lease was released.
            KeyError: the plan has no such name.
        """
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

    def names(self) -> tuple[str, ...]:
        """Those of the plan, in its order."""
        return tuple(self._entries)

    def get(self, name: str) -> Tensor | None:
        """The tensor `name`, or None where the plan has none of that name. Raises StaleLeaseError after release."""
        return self[name] if name in self._entries else None

    def release(self) -> None:
        """Give the slab back. Idempotent."""
        with self._memory._lock:
            slab, arena_lease = self._slab, self._arena_lease
            self._slab = self._arena_lease = None
        if slab is not None:
            self._memory._give_back(slab, arena_lease)

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("lease: it is the use of one slab and cannot be copied or pickled; clone the tensors in it")

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

    On the CPU slabs come from the C++ arena, which reuses them. On other devices, and where the extension is missing, a
    slab is one tensor of torch's own allocator, which does the caching (and, on CUDA, sees it inside graph captures).

    Args:
        byte_budget: idle memory that the arena keeps for later leases, in bytes; slabs above it are freed, the oldest
            first.
        poison: fill slabs with NaN (bytes 0xFF) on lease and on release, to find reads of memory that nobody wrote.

    Raises:
        ValueError: `byte_budget` is not an int >= 0.
    """

    def __init__(self, byte_budget: int = DEFAULT_BYTE_BUDGET, *, poison: bool = False) -> None:
        if not isinstance(byte_budget, int) or byte_budget < 0:
            raise ValueError(f"byte_budget: expected an int >= 0, got {byte_budget!r}")
        arena = _arena_class()
        self._arena, self._byte_budget = None if arena is None else arena(byte_budget), byte_budget
        self._lock = Lock()
        self._counters = dict.fromkeys(_HOST_COUNTERS + _DEVICE_COUNTERS, 0)
        self._poison = False
        self.set_poison(poison)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, or what comes out of a pickle: the pool that samplers share, or an empty one like this."""
        if self is _default:
            return default_memory, ()
        return partial(type(self), poison=self._poison), (self._byte_budget,)

    def lease(self, plan: MemoryPlan, device: torch.device | str = "cpu", *, pinned: bool = False) -> Lease:
        """Memory for the plan's tensors on `device`; pinned: of the host, from where a CUDA device can copy without
        waiting for it. Raises MemoryError (torch.OutOfMemoryError on CUDA)."""
        return Lease(self, plan, torch.device(device), pinned)

    def stats(self) -> dict[str, int]:
        """Counters of what was leased.

        Returns:
            Of the host: `bytes` held (leased and idle), `idle_bytes`, `high_water` of `bytes`, `leases` granted,
            `reuses` of a slab among them, `active` leases. Of devices: `device_bytes` leased, `device_high_water`,
            `device_leases` granted.
        """
        with self._lock:
            return self._counters | ({} if self._arena is None else self._arena.stats())

    def set_poison(self, on: bool) -> None:
        """Switch the filling of slabs with NaN (bytes 0xFF) on or off."""
        self._poison = bool(on)
        if self._arena is not None:
            self._arena.set_poison(self._poison)

    def trim(self) -> None:
        """Free all idle host memory of the arena."""
        if self._arena is not None:
            self._arena.trim()

    def _take(self, nbytes: int, device: torch.device, pinned: bool) -> tuple[Any, Tensor, int]:
        """The arena's lease, where there is one, the slab: (nbytes,) uint8, and the lease's number."""
        if device.type == "cpu" and self._arena is not None and not pinned:
            arena_lease = self._arena.lease(nbytes)
            return arena_lease, torch.frombuffer(arena_lease, dtype=torch.uint8), arena_lease.generation
        if device.type == "cpu":  # torch aligns host memory to 64 bytes only
            slab = _host_bytes(nbytes if pinned else nbytes + ALIGNMENT, pinned)
            slab = slab if pinned else slab[-slab.data_ptr() % ALIGNMENT :][:nbytes]
        else:
            slab = torch.empty(nbytes, dtype=torch.uint8, device=device)
        if self._poison:
            slab.fill_(0xFF)
        return None, slab, self._count(device, nbytes)

    def _give_back(self, slab: Tensor, arena_lease: Any) -> None:
        if arena_lease is not None:
            arena_lease.release()
            return
        if self._poison:
            slab.fill_(0xFF)
        self._count(slab.device, -slab.numel())

    def _count(self, device: torch.device, nbytes: int) -> int:
        """Count a lease of torch's memory, or with minus its size the end of one; returns how many were granted."""
        prefix = "" if device.type == "cpu" else "device_"
        with self._lock:
            counters = self._counters
            counters[f"{prefix}leases"] += nbytes > 0
            counters[f"{prefix}bytes"] += nbytes
            counters[f"{prefix}high_water"] = max(counters[f"{prefix}high_water"], counters[f"{prefix}bytes"])
            if not prefix:
                counters["active"] += 1 if nbytes > 0 else -1
            return counters[f"{prefix}leases"]


def _host_bytes(count: int, pinned: bool) -> Tensor:
    try:
        return torch.empty(count, dtype=torch.uint8, pin_memory=pinned)
    except RuntimeError as error:
        raise MemoryError(f"solver memory: {error}") from error


_default: SolverMemory | None = None
_default_lock = Lock()


def default_memory() -> SolverMemory:
    """The pool that samplers share unless they are given one. DEQDIFF_FAST_POISON=1 turns its poison on."""
    global _default
    with _default_lock:
        if _default is None:
            _default = SolverMemory(poison=os.environ.get("DEQDIFF_FAST_POISON", "0") not in ("", "0"))
        return _default


def _after_fork() -> None:
    """A forked child gets a pool of its own: what is idle in the parent's would be copied page by page."""
    global _default
    _default = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
