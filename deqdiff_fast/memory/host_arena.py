"""The host arena without the C++ extension: same planning, reuse, budget, poison and statistics as `_C.Arena`."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

ALIGNMENT = 256
_ADDRESSABLE = 1 << 62

Block = npt.NDArray[np.uint8]


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class HostLease:
    """Exclusive use of one slab. The slab serves another lease only when no view of this one is left."""

    def __init__(self, arena: HostArena, block: Block, nbytes: int, generation: int) -> None:
        self._arena, self._block = arena, block
        self._view: memoryview | None = memoryview(block[:nbytes])  # type: ignore[arg-type]
        self.nbytes, self.generation = nbytes, generation
        # Tensors made from the view keep it alive; its death is the proof that nobody can touch the slab any more.
        weakref.finalize(self._view, arena._give_back, block).atexit = False

    @property
    def released(self) -> bool:
        return self._view is None

    def view(self) -> memoryview:
        if self._view is None:
            raise BufferError("the lease was released; take a new one with Arena.lease()")
        return self._view

    def release(self) -> None:
        """Give the slab back. It is reused once no view of it is left. Idempotent."""
        if self._view is not None:
            if self._arena._poison:
                self._block.fill(0xFF)
            self._view = None


class HostArena:
    """Slabs of 256-byte aligned host memory; idle ones above `byte_budget` in sum are freed, the oldest first."""

    def __init__(self, byte_budget: int) -> None:
        if byte_budget < 0:
            raise ValueError(f"byte_budget: expected an int >= 0, got {byte_budget}")
        self._budget = byte_budget
        self._lock = threading.Lock()
        self._returned: deque[Block] = deque()  # appended to by finalizers, which must not wait for the lock
        self._idle: list[Block] = []
        self._poison = False
        self._bytes = self._high_water = self._leases = self._reuses = self._active = 0

    @staticmethod
    def plan(request: Sequence[tuple[str, int]]) -> tuple[dict[str, int], int]:
        """[(name, nbytes), ...] -> ({name: offset}, total bytes)."""
        offsets: dict[str, int] = {}
        total = 0
        for name, nbytes in request:
            if name in offsets:
                raise ValueError(f"plan: the name '{name}' appears twice")
            if nbytes > _ADDRESSABLE - total:
                raise OverflowError(f"plan: '{name}' does not fit the address space")
            offsets[name] = total
            total += _aligned(nbytes)
        return offsets, total

    def lease(self, total_bytes: int) -> HostLease:
        size = max(ALIGNMENT, _aligned(total_bytes))
        with self._lock:
            self._collect()
            fitting = [k for k, block in enumerate(self._idle) if block.nbytes >= size and block.nbytes // 2 <= size]
            reused = bool(fitting)
            if reused:
                block = self._idle.pop(min(fitting, key=lambda k: self._idle[k].nbytes))
            else:
                raw = np.empty(size + ALIGNMENT, np.uint8)
                start = -raw.ctypes.data % ALIGNMENT
                block = raw[start : start + size]
                self._bytes += size
                self._high_water = max(self._high_water, self._bytes)
            self._reuses += reused
            self._active += 1
            self._leases += 1
            generation = self._leases
        if self._poison:
            block.fill(0xFF)
        return HostLease(self, block, total_bytes, generation)

    def stats(self) -> dict[str, int]:
        with self._lock:
            self._collect()
            return {
                "bytes": self._bytes,
                "idle_bytes": sum(block.nbytes for block in self._idle),
                "high_water": self._high_water,
                "leases": self._leases,
                "reuses": self._reuses,
                "active": self._active,
            }

    def set_poison(self, on: bool) -> None:
        """Fill slabs with NaN (0xFF bytes) on lease and on release."""
        self._poison = on

    def trim(self) -> None:
        """Free every idle slab."""
        with self._lock:
            self._collect()
            self._shrink(0)

    def _give_back(self, block: Block) -> None:
        self._returned.append(block)
        if self._lock.acquire(blocking=False):  # held by this very thread when the garbage collector called us
            try:
                self._collect()
            finally:
                self._lock.release()

    def _collect(self) -> None:
        while self._returned:
            self._idle.append(self._returned.popleft())
            self._active -= 1
        self._shrink(self._budget)

    def _shrink(self, limit: int) -> None:
        held = sum(block.nbytes for block in self._idle)
        while self._idle and held > limit:
            nbytes = self._idle.pop(0).nbytes
            held -= nbytes
            self._bytes -= nbytes
