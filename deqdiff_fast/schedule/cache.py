"""What follows from a schedule alone and every solve needs: computed once, cached as long as the schedule lives."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch

from .._locks import Lock
from .schedule import Schedule

MOST = 16  # of one schedule: batch sizes, dtypes, devices
_cached: WeakKeyDictionary[Schedule, OrderedDict[Hashable, Any]] = WeakKeyDictionary()
_spent: WeakKeyDictionary[Schedule, float] = WeakKeyDictionary()
_lock = Lock()
Value = TypeVar("Value")


def cached(schedule: Schedule, key: Hashable, make: Callable[[], Value]) -> Value:
    """`make()`, or what it returned for that key before; nobody may write to it.

    Computed as ordinary tensors, also under `torch.inference_mode`, for a later solve may be one with gradients. Where
    operations are traced or intercepted (a compiler, a dispatch mode, torch.func) nothing is cached, for tensors may
    then be of another kind.
    """
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0 or transformed:
        return make()
    with _lock:
        entries = _cached.setdefault(schedule, OrderedDict())
        if key in entries:
            entries.move_to_end(key)
            found: Value = entries[key]
            return found
    began = time.thread_time()
    with torch.inference_mode(False), torch.no_grad():
        value = make()
    with _lock:
        entries[key] = value
        _spent[schedule] = _spent.get(schedule, 0.0) + time.thread_time() - began
        while len(entries) > MOST:
            entries.popitem(last=False)
    return value


def seconds_of_tables(schedule: Schedule) -> float:
    """What computing its values has taken so far: solves during which that grows prepare what later ones find."""
    return _spent.get(schedule, 0.0)
