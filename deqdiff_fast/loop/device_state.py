"""What the loop keeps on a device, and how its decisions come back to the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .base import Chain
from .window import Window


class DeviceState(NamedTuple):
    """What the loop keeps on the device; always in the same place where its work is to be replayed."""

    previous_bounds: Tensor  # (2, B) int32, see `kernels.advance_window`
    decision: Tensor  # (4, B)
    rows: Tensor  # (N,) int64
    previous: Tensor  # (T, B), see `StoppingRule.mark_converged`
    strict: Tensor  # (B,)

    @classmethod
    def make(cls, chain: Chain, capacity: int) -> DeviceState:
        """For a model call of at most `capacity` rows."""
        device, batch = chain.lo.device, chain.batch
        return cls(
            torch.zeros(2, batch, dtype=torch.int32, device=device),
            torch.zeros(4, batch, dtype=chain.sq_diff.dtype, device=device),
            torch.zeros(capacity, dtype=torch.int64, device=device),
            torch.empty_like(chain.sq_diff),
            torch.ones_like(chain.sq_diff[0]),
        )

    def start(self, chain: Chain, window: Window) -> None:
        """The bounds and rows of the first window."""
        self.previous.fill_(float("nan"))
        self.strict.fill_(1)
        if len(set(window.lo)) > 1:
            self.take(chain, window)
            return
        lo, hi = window.lo[0], window.hi[0]  # the same for all samples: nothing is copied to the device
        chain.lo.fill_(lo), chain.hi.fill_(hi)
        torch.arange(lo * chain.batch, lo * chain.batch + len(self.rows), out=self.rows)
        self.rows.masked_fill_(self.rows >= hi * chain.batch, chain.num_steps * chain.batch)

    def take(self, chain: Chain, window: Window) -> None:
        """The bounds and rows of a window that the host has changed."""
        chain.lo.copy_(torch.tensor(window.lo, dtype=torch.int32))
        chain.hi.copy_(torch.tensor(window.hi, dtype=torch.int32))
        rows = window.rows()
        flat = torch.arange(rows.lo * chain.batch, rows.hi * chain.batch) if rows.flat is None else rows.flat
        self.rows.fill_(chain.num_steps * chain.batch)
        self.rows[: rows.count].copy_(flat)


class AsyncReadback:
    """Decisions on their way to the host, in order; at most two at a time."""

    def __init__(self, like: Tensor) -> None:
        pinned = like.device.type == "cuda"
        self._slots = [torch.empty(like.shape, dtype=like.dtype, pin_memory=pinned) for _ in range(2)]
        event: Callable[[], Any] = torch.cuda.Event
        self._events = [event() for _ in self._slots] if pinned else None
        self._queued = self._read = 0

    @property
    def waiting(self) -> int:
        """Decisions that were queued and not read."""
        return self._queued - self._read

    def enqueue(self, decision: Tensor) -> None:
        """Queue a copy; the host goes on."""
        at = self._queued % 2
        self._slots[at].copy_(decision, non_blocking=True)
        if self._events is not None:
            self._events[at].record(torch.cuda.current_stream(decision.device))
        self._queued += 1

    def read(self) -> list[list[float]]:
        """The oldest decision that was not read. The one place where the host waits for a round."""
        at = self._read % 2
        if self._events is not None:
            self._events[at].synchronize()  # late read
        self._read += 1
        decision: list[list[float]] = self._slots[at].tolist()  # late read
        return decision
