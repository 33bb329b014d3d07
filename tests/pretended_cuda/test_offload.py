"""A history on the host of a pretended device: what stays on the device, and that nothing waits for the copies."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import deqdiff_fast as dq
from deqdiff_fast.engine import placement
from deqdiff_fast.engine.placement import Placement
from deqdiff_fast.memory import SolverMemory, pool
from deqdiff_fast.nodes.chain import NodeChain
from deqdiff_fast.nodes.rounds import NodeRounds


class DeviceBytes(TorchDispatchMode):
    """Bytes that are on the device, and the most there were at a time."""

    def __init__(self):
        super().__init__()
        self.live, self.now, self.peak = set(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            held = getattr(tensor, "held", None) if isinstance(tensor, Tensor) else None
            if held is not None and held.untyped_storage()._cdata not in self.live:
                self.count(held.untyped_storage())
        return out

    def count(self, storage):
        key, size = storage._cdata, storage.nbytes()
        self.live.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.gone, key, size)

    def gone(self, key, size):
        self.live.discard(key)
        self.now -= size


def model(x, t):
    level = (t.to(x.dtype) / 1000)[:, None]
    return 0.9 * level * x + 0.05 * torch.sin(2 * x + level)


def test_what_is_on_the_device_and_what_waits(device, monkeypatch, ddim):
    monkeypatch.setattr(placement, "PIECE_BYTES", 1 << 17)
    device.watch(monkeypatch, NodeRounds, "_advance", "nodes")
    device.watch(monkeypatch, NodeRounds, "_estimate_error", "estimate")
    device.watch(monkeypatch, NodeChain, "learn", "nodes")
    asked, plain = [], pool._host_bytes
    monkeypatch.setattr(
        pool, "_host_bytes", lambda count, pinned: asked.append((count, pinned)) or plain(count, pinned)
    )
    noise, found, peaks, planned = torch.randn(1, 4096, generator=torch.Generator().manual_seed(0)), {}, {}, {}
    for memory in ("device", "offload"):
        sampler = dq.DEQSampler(
            model, ddim(16), solver="quasi-newton", memory=memory, max_batch=4, cuda_graph=False, tol=3e-2
        )
        options, draw = sampler.options, lambda: torch.Generator().manual_seed(1)
        object.__setattr__(options, "memory", SolverMemory(0))
        with device:
            there = noise.to("cuda:0")
            planned[memory] = Placement.of(options.system(there, None), options).bytes(options.solver)
            sampler.sample(there, generator=draw())
            device.waits.clear()
            asked.clear()
            with DeviceBytes() as count:
                found[memory] = sampler.sample(there, generator=draw())
        peaks[memory] = count.peak
        assert device.waits["nodes"] == []
        assert device.launches["nodes"].total() > 0
        assert found[memory].stats.rounds == found[memory].stats.node_rounds
        assert bool(asked) == (memory == "offload")
    assert all(pinned for _, pinned in asked)
    assert peaks["device"] <= planned["device"][0]
    assert peaks["offload"] <= planned["offload"][0]
    assert peaks["offload"] < 0.55 * peaks["device"]
    assert planned["device"][1] == 0
    assert max(count for count, _ in asked) <= planned["offload"][1]
    serial = sampler.serial(noise, generator=draw()).sample
    off = (found["offload"].sample.held - serial).norm() / serial.norm()
    assert off < 3e-2
    assert off > 0
