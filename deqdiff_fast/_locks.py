"""The lock that all of the library uses: one that neither a fork nor the garbage collector turns into a deadlock."""

from __future__ import annotations

import os
import threading
from typing import Any
from weakref import WeakSet


class Lock:
    """A lock for `with`. Reentrant, since the garbage collector may run a finalizer in the thread that holds it, which
    wants it too. In a forked child it is free, unless the thread that forked holds it: the others are gone. A copy, and
    what comes out of a pickle, is a lock of its own.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        _LOCKS.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *exc: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    def renew(self) -> None:
        """In a forked child: leave a lock behind that a thread held which does not exist here."""
        if self._lock.acquire(blocking=False):
            self._lock.release()
        else:
            self._lock = threading.RLock()


_LOCKS: WeakSet[Lock] = WeakSet()


def _after_fork() -> None:
    for lock in list(_LOCKS):
        lock.renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
