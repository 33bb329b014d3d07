"""A CUDA device that is not there: tensors that say they live on it and keep their numbers on the CPU.

What the library does for a device, the loop that decides there, the mailbox, the planner's measurements, all runs as it
would, with real numbers. Operations on tensors of two devices fail as they do on a real one; whatever would make the
host wait is noted, and so is every operation that would be a launch. The ops of `kernels` run on the CPU: Triton is
tested elsewhere.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from contextlib import contextmanager

import pytest
import torch
from graph_api import GraphApi
from graph_solves import Net
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from deqdiff_fast.engine import graph_cache, solve
from deqdiff_fast.loop.task import Lookahead

LOOKS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique", "equal.default")
INDEXING = ("aten.index.", "aten.index_put")  # they take indices on the CPU as well, and wait while those are copied
CUDA = torch.device("cuda:0")


class There(Tensor):
    """A tensor on the pretended device. For torch's own C++ it is on the CPU, which has no guard for other devices."""

    held: Tensor
    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = True  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, held):
        self = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype
        )
        self.held = held
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func}: outside of `with device`")

    def data_ptr(self):
        return self.held.data_ptr()


def on_cuda(device) -> bool:
    return device is not None and torch.device(device).type == "cuda"


class Pretended(TorchDispatchMode):
    """`waits` and `launches` by what the host was doing, see `doing`."""

    def __init__(self):
        super().__init__()
        self.now = "other"
        self.waits, self.launches = defaultdict(list), defaultdict(Counter)

    @contextmanager
    def doing(self, what):
        before, self.now = self.now, what
        try:
            yield
        finally:
            self.now = before

    def watch(self, monkeypatch, owner, method, what):
        """Everything inside of a method is `what`."""
        plain = getattr(owner, method)

        def watched(*args, **kwargs):
            with self.doing(what):
                return plain(*args, **kwargs)

        monkeypatch.setattr(owner, method, watched)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if There not in types and kwargs.get("device") is None:
            return func(*args, **kwargs)  # on the CPU; the tables of a solve are made of many of these
        name = str(func)
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        there = [t for t in tensors if isinstance(t, There)]
        crossing = bool(there) and any(t.dim() > 0 for t in tensors if not isinstance(t, There))
        asked = kwargs.get("device")
        on = on_cuda(asked) if asked is not None else bool(there)
        kwargs |= {"device": torch.device("cpu")} if asked is not None else {}
        kwargs.pop("pin_memory", None)
        if name.startswith(("aten._to_copy", "aten.copy_")):
            queued = kwargs.get("non_blocking") or (name.startswith("aten.copy_") and len(args) > 2 and args[2])
            waits = not queued and (crossing or on != bool(there))
        elif crossing:
            waits = name.startswith(INDEXING) and isinstance(args[0], There)
            assert waits, f"{name}: tensors on two devices"
        else:
            waits = bool(there) and any(look in name for look in LOOKS)
        if waits:
            self.waits[self.now].append(name)
        held = tree_map(lambda t: t.held if isinstance(t, There) else t, (args, kwargs))
        out = func(*held[0], **held[1])
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if on and not view and "empty" not in name and "detach" not in name:
            self.launches[self.now][name] += 1
        same = {id(t.held): t for t in there}
        return tree_map(lambda t: same.get(id(t), There(t) if on else t) if isinstance(t, Tensor) else t, out)

    def read(self, tensor):
        """Its numbers, on the CPU; the host waits."""
        if not isinstance(tensor, There):
            return tensor
        self.waits[self.now].append("read")
        return tensor.held.clone()


class Event:
    """Nothing is ever late here."""

    def __init__(self, *args, **kwargs):
        pass

    def record(self, *args):
        pass

    synchronize = record

    def elapsed_time(self, other):
        return 1.0


class Properties:
    multi_processor_count, total_memory, gcnArchName = 132, 80 << 30, ""


@pytest.fixture
def device(monkeypatch):
    """The mode to work under; `torch.tensor(...).to("cuda:0")` puts something there."""
    mode, to, cpu, tolist = Pretended(), Tensor.to, Tensor.cpu, Tensor.tolist

    def move(self, *args, **kwargs):
        if args and isinstance(args[0], There):  # like another tensor: its dtype and its device
            args = (CUDA, args[0].dtype)
        if isinstance(self, There) and args and isinstance(args[0], (str, torch.device)) and not on_cuda(args[0]):
            return to(mode.read(self), *args[1:], **kwargs)
        if isinstance(self, There) and args and args[0] in (CUDA, "cuda:0") and args[1:] in ((), (self.dtype,)):
            return self  # it is there
        return to(self, *args, **kwargs)

    def made(plain):
        def make(data, *args, device=None, **kwargs):
            out = data if isinstance(data, There) else plain(data, *args, **kwargs)
            return out.to(CUDA) if on_cuda(device) and not isinstance(out, There) else out

        return make

    monkeypatch.setattr(Tensor, "to", move)
    monkeypatch.setattr(Tensor, "cpu", lambda self, *a, **k: mode.read(self) if isinstance(self, There) else cpu(self))
    monkeypatch.setattr(Tensor, "tolist", lambda self: tolist(mode.read(self)))
    monkeypatch.setattr(torch, "tensor", made(torch.tensor))
    monkeypatch.setattr(torch, "as_tensor", made(torch.as_tensor))
    nothing = lambda *args, **kwargs: None  # noqa: E731
    for owner, name, value in (
        (torch.cuda, "_lazy_init", nothing),
        (torch.cuda, "Event", Event),
        (torch.cuda, "current_stream", nothing),
        (torch.cuda, "synchronize", nothing),
        (torch.cuda, "empty_cache", nothing),
        (torch.cuda, "get_device_properties", lambda device: Properties),
        (torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
        (torch.cuda, "mem_get_info", lambda device=None: (70 << 30, 80 << 30)),
        (torch.accelerator, "synchronize", nothing),
    ):
        monkeypatch.setattr(owner, name, value)
    return mode


@pytest.fixture
def api(monkeypatch):
    """Torch's API of CUDA graphs, pretended; every solve may be recorded."""
    api = GraphApi()
    api.install(monkeypatch)
    monkeypatch.setattr(solve, "lookahead_policy", lambda system, request: Lookahead())
    recorder = graph_cache.CudaRecorder
    monkeypatch.setattr(graph_cache, "recorder_for", lambda device: recorder(torch.device("cuda", api.place)))
    return api


@pytest.fixture
def net(api):
    return Net(api).eval().requires_grad_(False)
