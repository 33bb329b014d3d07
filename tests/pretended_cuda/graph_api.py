"""Torch's API of CUDA graphs on a machine without a device: streams, events, captures, freed memory, the host's waits.

Tensors are those of the CPU, taken to be on the device `place`; torch's own `torch.cuda.graph` runs on top. What is
asked of the stream that a graph is captured on is captured, and not done; the graph holds on to memory that was
allocated in the capture, and of all other memory it only knows the address: once freed, there is something else there.
What waits for the device invalidates a capture, and a capture that ends invalid leaves torch without random numbers.
"""

from __future__ import annotations

import warnings
import weakref
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique", "equal.default")
DRAWS = ("rand", "normal_", "uniform_")


def index(device) -> int:
    return device if isinstance(device, int) else torch.device(device).index or 0


def storage_of(tensor):
    return tensor.untyped_storage()._cdata


class Stream:
    """`clock`: how much of every stream's work is done before what comes next on this one."""

    def __init__(self, api, device=None):
        self.api, self.device = api, torch.device("cuda", api.current if device is None else index(device))
        self.clock = {self: 0}

    def follow(self, clock):
        for stream, tick in clock.items():
            self.clock[stream] = max(self.clock.get(stream, 0), tick)

    def wait_event(self, event):
        self.follow(event.clock)

    def record_event(self):
        event = Event(self.api)
        event.record(self)
        return event


class Event:
    def __init__(self, api):
        self.api, self.clock = api, {}

    def record(self, stream=None):
        self.clock = dict((stream or self.api.streams[self.api.current]).clock)


class Address:
    """Memory that a graph does not hold on to."""

    def __init__(self, tensor):
        self.storage, self.dtype = weakref.ref(tensor.untyped_storage()), tensor.dtype
        self.layout = tensor.storage_offset(), tuple(tensor.shape), tensor.stride()

    def tensor(self, api):
        found = self.storage()
        if found is not None:
            return torch.empty(0, dtype=self.dtype).set_(found, *self.layout)
        api.freed += 1
        other = torch.empty_strided(*self.layout[1:], dtype=self.dtype)
        return other.fill_(0.75 if self.dtype.is_floating_point else 0)


class Graph:
    """`torch.cuda.CUDAGraph`."""

    def __init__(self, api):
        self.api, self.notes, self.valid, self.shared = api, [], True, None
        self.own, self.undo, self.rows = {}, {}, 0
        self.mode = self.stream = None

    def capture_begin(self, pool=None, capture_error_mode="global", **_):
        assert self.api.capturing is None, "torch allows one capture at a time"
        self.shared, self.mode = pool or object(), capture_error_mode
        self.stream, self.api.capturing = self.api.streams[self.api.current], self
        self.api.captures += 1

    def capture_end(self):
        self.api.capturing = None
        with _disable_current_modes():
            for storage, before in self.undo.values():
                storage.copy_(before)
        self.undo.clear()
        if not self.valid:
            self.api.poisoned = True
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        self.api.graphs.add(self)

    def pool(self):
        return self.shared

    def refuse(self):
        self.valid = False
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    def note(self, func, args, kwargs):
        given = {storage_of(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in written_by(func, args, kwargs):
            if storage_of(tensor) not in self.own and storage_of(tensor) not in self.undo:
                storage = tensor.untyped_storage()
                self.undo[storage_of(tensor)] = storage, storage.clone()
        out = func(*args, **kwargs)
        fresh = [t for t in tree_leaves(out) if isinstance(t, Tensor) and storage_of(t) not in given]
        self.own |= {storage_of(t): t for t in fresh}
        kept = tree_map(
            lambda t: t if not isinstance(t, Tensor) or storage_of(t) in self.own else Address(t), (args, kwargs)
        )
        self.notes.append((func, *kept, out if fresh else None))
        return out

    def replay(self):
        stream = self.api.streams[self.api.current]
        with _disable_current_modes():
            for func, args, kwargs, out in self.notes:
                args, kwargs = tree_map(lambda t: t.tensor(self.api) if isinstance(t, Address) else t, (args, kwargs))
                self.api.order(stream, func, args, kwargs)
                again = func(*args, **kwargs)
                for target, value in zip(tree_leaves(out), tree_leaves(again)):
                    if isinstance(target, Tensor) and storage_of(target) in self.own:
                        target.copy_(value)


def written_by(func, args, kwargs):
    """The tensors that an operation writes to, by its schema."""
    given = dict(zip((a.name for a in func._schema.arguments), args)) | kwargs
    names = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return [t for name in names for t in tree_leaves(given.get(name)) if isinstance(t, Tensor)]


class GraphApi(TorchDispatchMode):
    """Everything under it is asked of a device."""

    def __init__(self):
        super().__init__()
        self.current, self.place = 0, 0
        """The current device, and the one that all tensors are on."""
        self.streams = {device: Stream(self, device) for device in (0, 1)}
        self.capturing, self.poisoned, self.sync_mode, self.captures, self.freed = None, False, 0, 0, 0
        self.graphs, self.calls = weakref.WeakSet(), 0
        self.last, self.races, self.recorded = {}, [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name, graph = kwargs or {}, str(func), self.capturing
        if self.poisoned and any(draw in name for draw in DRAWS):
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")
        if any(look in name for look in WAITS):
            self.wait()
        if graph is None or self.streams[self.place] is not graph.stream:
            out = func(*args, **kwargs)
            self.order(self.streams[self.place], func, args, kwargs, out)
            return out
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        return func(*args, **kwargs) if view else graph.note(func, args, kwargs)

    def wait(self):
        """The host waits for the device, in this thread."""
        if self.capturing is not None:
            self.capturing.refuse()
        if self.sync_mode == 2:
            raise RuntimeError("called a synchronizing CUDA operation")
        if self.sync_mode == 1:
            warnings.warn("called a synchronizing CUDA operation (Triggered internally)", stacklevel=2)

    def allocate(self):
        """cudaMalloc in another thread."""
        if self.capturing is not None and self.capturing.mode == "global":
            self.capturing.refuse()

    def order(self, stream, func, args, kwargs, out=None):
        """Note what the operation reads and writes, and what another stream did to it that need not be over."""
        stream.clock[stream] += 1
        if any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns):
            return  # a view
        changed = {storage_of(t) for t in (*written_by(func, args, kwargs), *tree_leaves(out)) if isinstance(t, Tensor)}
        for tensor in tree_leaves((args, kwargs, out)):
            if not isinstance(tensor, Tensor):
                continue
            storage, key = tensor.untyped_storage(), storage_of(tensor)
            if key not in self.last:
                self.last[key] = {}, {}
                weakref.finalize(storage, self.last.pop, key, None)
            writes, reads = self.last[key]
            for other, tick in (writes | reads if key in changed else writes).items():
                if stream.clock.get(other, 0) < tick:
                    self.races.append(f"{func} on memory that another stream may still use")
            (writes if key in changed else reads)[stream] = stream.clock[stream]

    @contextmanager
    def on(self, stream):
        """`torch.cuda.stream`."""
        at = stream.device.index
        before, self.streams[at] = self.streams[at], stream
        device, self.current = self.current, at
        try:
            yield
        finally:
            self.streams[at], self.current = before, device

    @contextmanager
    def using(self, device):
        """`torch.cuda.device`."""
        before, self.current = self.current, index(device)
        try:
            yield
        finally:
            self.current = before

    def install(self, monkeypatch):
        """In the place of torch's own."""
        modes = {"default": 0, "warn": 1, "error": 2}
        for name, value in {
            "CUDAGraph": lambda: Graph(self),
            "Stream": lambda device=None: Stream(self, device),
            "Event": lambda **_: Event(self),
            "stream": self.on,
            "device": self.using,
            "current_stream": lambda device=None: self.streams[self.current if device is None else index(device)],
            "synchronize": lambda device=None: None,
            "empty_cache": lambda: None,
            "get_sync_debug_mode": lambda: self.sync_mode,
            "set_sync_debug_mode": lambda mode: setattr(self, "sync_mode", modes.get(mode, mode)),
            "is_available": lambda: True,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
        monkeypatch.setattr(torch.cuda.graph, "default_capture_stream", None)
        monkeypatch.setattr(Tensor, "record_stream", lambda tensor, on: self.recorded.append((storage_of(tensor), on)))
