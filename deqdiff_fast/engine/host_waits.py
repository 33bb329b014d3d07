"""What makes the host wait for a CUDA device, found out before a capture, which would fail of it.

A failed capture may leave torch unable to draw random numbers on that device (torch 2.11), so none is attempted of work
that waits.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from .._locks import Lock

WAITS = "called a synchronizing CUDA operation"  # torch's warning
_lock = Lock()


@dataclass
class HostWaits:
    """What was seen of one thread."""

    thread: int
    found: int = 0
    """How often it waited."""
    known: bool = True
    """Whether all of it was seen."""


_watching: list[HostWaits] = []
"""One inside the other: warnings are the whole process', so that all are of one thread."""


@contextmanager
def watch_host_waits() -> Iterator[HostWaits]:
    """How often this thread waits meanwhile; not known where another thread is watching.

    The mode is "warn" and not "error": it is the whole process', and other threads may wait as they please.
    """
    waits = HostWaits(threading.get_ident())
    with _lock:
        waits.known = not _watching or _watching[-1].thread == waits.thread
        if waits.known:
            _watching.append(waits)
    if not waits.known:
        yield waits
        return
    try:
        with _told(waits):
            yield waits
    finally:
        _watching.pop()


@contextmanager
def _told(waits: HostWaits) -> Iterator[None]:
    """Torch's warnings of waits are counted, those of other threads left out, and nobody else sees them."""
    told = warnings.showwarning

    def show(message: Warning | str, *where: Any, **more: Any) -> None:
        if not str(message).startswith(WAITS):
            told(message, *where, **more)
        elif threading.get_ident() == waits.thread:
            for outer in _watching:
                outer.found += 1

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
        warnings.filterwarnings("always", message=WAITS)
        before = torch.cuda.get_sync_debug_mode()
        warnings.showwarning = show
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)
            waits.known = warnings.showwarning is show  # else another thread's `catch_warnings` came in between
            warnings.showwarning = told
