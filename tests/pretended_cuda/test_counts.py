"""What rounds on nodes ask of a device at B = 1, counted: launches beside the networks, and waits of the host.

The second solve, which finds its tables; docs/gpu.md has the figures, and `pytest -s` on this file prints them.
"""

from __future__ import annotations

import pytest
import torch

import deqdiff_fast as dq
from deqdiff_fast.engine import node_problem, system
from deqdiff_fast.model import batched
from deqdiff_fast.model.batched import BatchedModel
from deqdiff_fast.nodes.chain import NodeChain
from deqdiff_fast.nodes.rounds import NodeRounds


class Net(torch.nn.Module):
    """Three operations a call, which are the network's."""

    def __init__(self, device, off=0.0):
        super().__init__()
        self.device, self.off = device, off

    def forward(self, x, t):
        with self.device.doing("network"):
            return 0.9 * x + (0.05 + self.off) * torch.sin(2 * x + 0.001 * t.to(x.dtype).view(-1, 1, 1, 1))


@pytest.fixture
def tables(monkeypatch):
    """Kept from solve to solve, which they are not under a dispatch mode otherwise."""
    kept = {}

    def cached(schedule, key, make):
        if key not in kept:
            kept[key] = make()
        return kept[key]

    for module in (batched, node_problem, system):
        monkeypatch.setattr(module, "cached", cached)


ROUND = {"model call": 16, "asking": 24, "the chain": 92, "other nodes": 34, "waits": 3}  # at most
PARTS = {
    "model call": (BatchedModel, "evaluate"), "asking": (NodeRounds, "_ask"), "the chain": (NodeRounds, "_advance"),
    "other nodes": (NodeRounds, "_change_nodes"), "sweeps": (NodeChain, "_settle"),
}  # fmt: skip


@pytest.mark.usefixtures("tables")
@pytest.mark.parametrize(
    ("steps", "solver", "most"),
    [
        (100, "quasi-newton", ROUND),
        (1000, "quasi-newton", ROUND),
        (100, "draft", ROUND | {"asking": 31, "the chain": 105, "waits": 5, "sweep": 24, "waits a sweep": 1.2}),
    ],
)
def test_launches_of_a_round(device, monkeypatch, ddim, steps, solver, most):
    for what, (owner, method) in PARTS.items():
        device.watch(monkeypatch, owner, method, what)
    sweeps, scan = [], NodeChain._scan

    def counted(chain, *args):
        sweeps.append(device.now == "sweeps")
        return scan(chain, *args)

    monkeypatch.setattr(NodeChain, "_scan", counted)
    aids = {"draft": Net(device, off=0.004)} if solver == "draft" else {}
    sampler = dq.DEQSampler(Net(device), ddim(steps), solver=solver, window=steps, cuda_graph=False, **aids)
    noise = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with device:
        for _ in range(2):
            device.launches.clear(), device.waits.clear(), sweeps.clear()
            stats = sampler.sample(noise.to("cuda:0")).stats
    rounds = stats.node_rounds
    assert rounds == stats.rounds
    found = {what: device.launches[what].total() / rounds for what in (*PARTS, "other")}
    found["waits"] = sum(len(waits) for what, waits in device.waits.items() if what not in ("other", "sweeps")) / rounds
    if solver == "draft":
        found |= {"sweep": device.launches["sweeps"].total() / sum(sweeps), "sweeps": sum(sweeps) / rounds}
        found["waits a sweep"] = len(device.waits["sweeps"]) / sum(sweeps)
    print(solver, steps, rounds, "rounds, each:", {what: round(value, 1) for what, value in found.items()})
    assert {what: value for what, value in found.items() if value > most.get(what, float("inf"))} == {}
