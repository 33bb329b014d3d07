"""What follows from a schedule alone and every solve needs: computed once, cached as long as the schedule lives."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import is_dataclass
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .._locks import Lock
from .schedule import Schedule

MOST = 64  # of one schedule: batch sizes, dtypes, devices, sets of nodes and what leads from one to another
_cached: WeakKeyDictionary[Schedule, OrderedDict[Hashable, Made]] = WeakKeyDictionary()
_spent: WeakKeyDictionary[Schedule, float] = WeakKeyDictionary()
_lock = Lock()
Value = TypeVar("Value")


class Made:
    """A value, and when those of its tensors that lie on CUDA devices are ready: another stream has to wait for that,
    and they must not be freed before it is done with them."""

    def __init__(self, value: Any) -> None:
        self.value = value
        leaves = tree_leaves(value if not is_dataclass(value) else list(vars(value).values()))
        self.tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.device.type == "cuda"]
        self.ready: dict[torch.device, tuple[Any, Any]] = {}
        for device in {tensor.device for tensor in self.tensors}:
            stream: Any = torch.cuda.current_stream(device)
            self.ready[device] = stream, stream.record_event()

    def take(self) -> Any:
        """The value, on the current streams."""
        for tensor in self.tensors:
            stream: Any = torch.cuda.current_stream(tensor.device)
            made_on, event = self.ready[tensor.device]
            if stream != made_on:
                stream.wait_event(event)
                tensor.record_stream(stream)
        return self.value


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
            found: Value = entries[key].take()
            return found
    began = time.thread_time()
    with torch.inference_mode(False), torch.no_grad():
        value = make()
        made = Made(value)
    with _lock:
        entries[key] = made
        _spent[schedule] = _spent.get(schedule, 0.0) + time.thread_time() - began
        while len(entries) > MOST:
            entries.popitem(last=False)
    return value


def seconds_of_tables(schedule: Schedule) -> float:
    """What computing its values has taken so far: solves during which that grows prepare what later ones find."""
    return _spent.get(schedule, 0.0)
