"""Copies and pickles of all that a program may hold: the settings travel, memory and recordings do not."""

from __future__ import annotations

import copy
import importlib
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

import deqdiff_fast as dq
from deqdiff_fast.memory import MemoryPlan, default_memory

WAYS = {"deepcopy": copy.deepcopy, "pickle": lambda value: pickle.loads(pickle.dumps(value)), "copy": copy.copy}
DEEP = ["deepcopy", "pickle"]


class Net(nn.Module):
    """A model that can be pickled: a small nonlinear map of each row."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-0.5, 0.5, 16).view(4, 4))

    def forward(self, x, t, cond=None):
        return torch.tanh(x @ self.weight) + (0 if cond is None else cond)


class Policy(nn.Module):
    """What a user has in a checkpoint."""

    def __init__(self, schedule):
        super().__init__()
        self.net = Net()
        self.sampler = dq.DEQSampler(self.net, schedule, solver="quasi-newton", tol=1e-4)
        self.inverter = dq.DEQInverter(self.net, schedule, "auto", memory=dq.SolverMemory(1 << 20))


@pytest.mark.parametrize("way", DEEP)
def test_a_module_that_holds_samplers(ddim, noise, way):
    policy = Policy(ddim(8)).requires_grad_(False)
    expected = policy.sampler.sample(noise(2, (4,))).sample
    policy.inverter.invert(noise(2, (4,)))
    other = WAYS[way](policy)
    assert other.sampler.model is other.sampler.options.model is other.net is other.inverter.model is not policy.net
    assert torch.equal(other.sampler.sample(noise(2, (4,))).sample, expected)
    assert other.inverter.invert(noise(2, (4,))).converged.all()
    with torch.no_grad():
        policy.net.weight.zero_()
    assert torch.equal(other.sampler.sample(noise(2, (4,))).sample, expected)


@pytest.mark.parametrize("way", list(WAYS))
def test_a_sampler_shares_nothing_that_a_solve_writes_to(ddim, noise, way):
    memory = dq.SolverMemory(1 << 20, poison=True)
    sampler = dq.DEQSampler(Net(), ddim(8), window=4, tol=1e-3, max_batch=5, memory=memory, solver=dq.Picard())
    sampler.options.learned["max_batch"] = 3
    other = WAYS[way](sampler)
    mine, its = sampler.options, other.options
    assert (its.window, its.tol, its.max_batch, its.solver, its.learned) == (4, 1e-3, 5, dq.Picard(), {"max_batch": 3})
    assert other.planner.options is its
    for name in ("memory", "graph_cache", "learned"):
        assert getattr(mine, name) is not getattr(its, name)
    before = memory.stats()
    with torch.no_grad():
        other.sample(noise(1, (4,)))
    assert memory.stats() == before
    assert its.memory.stats()["leases"] == 1
    assert its.memory._poison


@pytest.mark.parametrize("way", list(WAYS))
def test_pools(ddim, way):
    assert WAYS[way](default_memory()) is default_memory()
    assert WAYS[way](dq.DEQSampler(Net(), ddim(4))).options.memory is default_memory()
    inverter = dq.DEQInverter(Net(), ddim(4), memory=dq.SolverMemory(1 << 10))
    other = WAYS[way](inverter).memory
    assert other is not inverter.memory
    other.lease(MemoryPlan().add("x", (1 << 12,), torch.uint8)).release()
    assert other.stats()["bytes"] == 0  # the budget is the same
    with (
        dq.SolverMemory().lease(MemoryPlan().add("x", (1,), torch.uint8)) as lease,
        pytest.raises(TypeError, match=r"lease: .*clone"),
    ):
        WAYS[way](lease)


@pytest.mark.parametrize("way", DEEP)
def test_samplers_that_share_a_pool_do_so_in_a_copy(ddim, way):
    memory = dq.SolverMemory()
    first, second = WAYS[way]([dq.DEQSampler(Net(), ddim(4), memory=memory) for _ in range(2)])
    assert first.options.memory is second.options.memory is not memory


@pytest.mark.parametrize("way", list(WAYS))
def test_schedules_spectra_solvers_gradients_and_guided_models(ddim, noise, way):
    schedule = WAYS[way](ddim(6, eta=0.3))
    assert torch.equal(schedule.state_coef, ddim(6, eta=0.3).state_coef)
    spectrum = dq.SpectralSlope(torch.ones(4), torch.eye(4))
    assert torch.equal(WAYS[way](spectrum).variance, spectrum.variance)
    for value in (dq.Picard(), dq.Anderson(history=2), dq.QuasiNewton(), dq.Drafted(), dq.Implicit(), dq.Phantom()):
        assert WAYS[way](value) == value
    cond = torch.ones(2, 4)
    model = dq.guided(Net().requires_grad_(False), cond, torch.zeros(2, 4), 2.0)
    sampler = dq.DEQSampler(model, schedule, solver="picard")
    draw = [torch.Generator().manual_seed(0) for _ in range(2)]
    out, again = sampler.sample(noise(2, (4,)), None, draw[0]), WAYS[way](sampler).sample(noise(2, (4,)), None, draw[1])
    assert torch.equal(out.sample, again.sample)


@pytest.mark.parametrize("way", list(WAYS))
def test_results_and_errors(ddim, noise, way):
    with torch.no_grad():
        out = dq.DEQSampler(Net(), ddim(6)).sample(noise(2, (4,)), return_trajectory=True)
    inverted = dq.DEQInverter(Net(), ddim(6)).invert(noise(2, (4,)))
    assert torch.equal(WAYS[way](out).trajectory, out.trajectory)
    assert str(WAYS[way](out).stats.plan) == str(out.stats.plan)
    assert torch.equal(WAYS[way](inverted).noise, inverted.noise)
    error = WAYS[way](dq.NonFiniteError("it broke", step=1, timestep=2.0, round=3, sample=4))
    assert (str(error), error.step, error.timestep, error.round, error.sample) == ("it broke", 1, 2.0, 3, 4)
    error = WAYS[way](dq.NotConvergedError("no", out))
    assert str(error) == "no"
    assert torch.equal(error.solution.sample, out.sample)


def test_an_average_of_weights_keeps_a_sampler_of_its_own(ddim, noise):
    """What torch's EMA is: a deep copy of the whole module, updated as training goes on."""
    policy = Policy(ddim(8))
    with torch.no_grad():
        policy.sampler.sample(noise(2, (4,)))
        average = torch.optim.swa_utils.AveragedModel(policy, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn())
        average.update_parameters(policy)
        policy.net.weight.mul_(3)
        average.update_parameters(policy)
        mean = average.module
        assert mean.sampler.model is mean.net is not policy.net
        found, expected = mean.sampler.sample(noise(2, (4,))), mean.sampler.serial(noise(2, (4,)))
        assert not torch.allclose(found.sample, policy.sampler.sample(noise(2, (4,))).sample, rtol=1e-2)
    assert torch.allclose(found.sample, expected.sample, rtol=1e-3, atol=1e-3)


NETWORK = """
import torch
from torch import nn


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)

    def forward(self, x, t):
        return torch.tanh(self.layer(x))
"""
WORKER = """
import pickle, torch
torch.set_num_threads(1)
with open("sent", "rb") as file:
    sampler, inverter, start = pickle.load(file)
assert sampler.model is inverter.model
torch.save((sampler.sample(start).sample, inverter.invert(0.1 * start).noise), "found")
"""


def test_a_process_that_was_spawned_solves_what_it_was_sent(ddim, noise, tmp_path, monkeypatch):
    """As a worker of a data loader or a pool of processes is given it: a pickle, in an interpreter of its own."""
    (tmp_path / "some_network.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(tmp_path)
    model = importlib.import_module("some_network").Network().requires_grad_(False)
    sampler = dq.DEQSampler(model, ddim(8), solver="quasi-newton", tol=1e-4)
    inverter = dq.DEQInverter(model, ddim(8), memory=dq.SolverMemory())
    start = noise(2, (4,))
    expected = sampler.sample(start).sample, inverter.invert(0.1 * start).noise
    (tmp_path / "sent").write_bytes(pickle.dumps((sampler, inverter, start)))
    done = subprocess.run([sys.executable, "-c", WORKER], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for found, wanted in zip(torch.load(tmp_path / "found"), expected):
        assert torch.allclose(found, wanted, atol=1e-5)
