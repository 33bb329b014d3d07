"""What the host does for a CUDA device, on one that is pretended: nothing is left on the other side, nobody waits."""

from __future__ import annotations

import pytest
import torch

import deqdiff_fast as dq
from deqdiff_fast.engine import solve
from deqdiff_fast.engine.plain_chain import PlainChain
from deqdiff_fast.engine.serial import finish_serially
from deqdiff_fast.engine.workspace import Workspace
from deqdiff_fast.inversion.equilibrium_step import EquilibriumStep
from deqdiff_fast.loop.device import DeviceLoop
from deqdiff_fast.loop.device_state import AsyncReadback
from deqdiff_fast.nodes.rounds import NodeRounds
from deqdiff_fast.solver.picard import Picard


class Net(torch.nn.Module):
    """A model without tensors of its own; `device` notes its operations as the network's."""

    def __init__(self, device, off=0.0):
        super().__init__()
        self.device, self.off = device, off

    def forward(self, x, t, shift=None):
        with self.device.doing("network"):
            at = 0.001 * t.to(x.dtype) + (0 if shift is None else shift)
            at = at.view(-1, *[1] * (x.dim() - 1))
            return 0.9 * x + (0.05 + self.off) * torch.sin(2 * x + at)


def start(shape=(2, 3, 8, 8), scale=1.0, dtype=torch.float32):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def sampled(device, schedule, noise=None, call=None, **options):
    """A sample on the device, which has to be the serial chain's on the CPU; returns its statistics."""
    noise, call, tol = start() if noise is None else noise, call or {}, options.setdefault("tol", 1e-4)
    model = options.pop("model", None) or Net(device)
    if options.get("solver") == "draft":
        options["draft"] = Net(device, off=0.004)
    sampler = dq.DEQSampler(model, schedule, cuda_graph=False, **options)
    seed = {"generator": torch.Generator().manual_seed(1)} if schedule.stochastic else {}
    expected = sampler.serial(noise, **seed, **call).sample
    seed = {"generator": torch.Generator().manual_seed(1)} if schedule.stochastic else {}
    with device:
        there = {name: {k: v.to("cuda:0") for k, v in held.items()} if isinstance(held, dict) else held
                 for name, held in call.items()}  # fmt: skip
        found = sampler.sample(noise.to("cuda:0"), **seed, **there)
    assert found.sample.device.type == "cuda"
    assert bool(found.converged.all())
    off = (found.sample.held.double() - expected.double()).flatten(1).norm(dim=1)
    assert bool((off <= 1.5 * tol * expected.double().flatten(1).norm(dim=1)).all())
    return found.stats


SOLVERS = ("quasi-newton", "draft", "triangular", "anderson", "deq-ddim", "picard", "paradigms", "parareal")


@pytest.mark.parametrize("window", ["auto", 12])
@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver(device, ddim, solver, window):
    window = 40 if window == "auto" or solver == "parareal" else window
    sampled(device, ddim(40), solver=solver, window=window)


@pytest.mark.parametrize("solver", ["quasi-newton", "draft"])
@pytest.mark.parametrize(
    ("change", "noise"),
    [
        ({"max_batch": 7}, {}),
        ({"max_rounds": 2}, {}),
        ({"backend": "auto", "window": "auto"}, {}),
        ({}, {"dtype": torch.float64}),
        ({"tol": 3e-2}, {"dtype": torch.bfloat16}),
        ({}, {"shape": (1, 5)}),
    ],
    ids=["max_batch", "max_rounds", "planned", "float64", "bfloat16", "vectors"],
)
def test_settings(device, ddim, solver, change, noise):
    sampled(device, ddim(40), start(**noise), solver=solver, **({"window": 40} | change))


@pytest.mark.parametrize("solver", ["quasi-newton", "draft"])
def test_noise_conditions_and_somebody_who_watches(device, ddim, solver):
    sampled(device, ddim(40, 0.7), solver=solver, window=40)
    sampled(device, ddim(40), call={"model_kwargs": {"shift": torch.tensor([0.0, 0.5])}}, solver=solver, window=40)
    seen = []
    sampled(device, ddim(40), call={"callback": lambda *round: seen.append(round) and None}, solver=solver, window=40)
    assert seen


@pytest.mark.parametrize("solver", ["quasi-newton", "draft"])
def test_multistep_chains(device, karras, solver):
    schedule = dq.Schedule.from_sigmas(karras(20), method="dpmpp_2m")
    sampled(device, schedule, start(scale=schedule.init_noise_sigma), solver=solver, window=20)


@pytest.mark.parametrize("method", ["equilibrium", "fixed_point", "ddim"])
def test_inversion(device, ddim, method):
    inverter = dq.DEQInverter(Net(device), ddim(20), method=method)
    expected = inverter.invert(start())
    with device:
        found = inverter.invert(start().to("cuda:0"))
    assert found.noise.device.type == "cuda"
    torch.testing.assert_close(found.noise.held, expected.noise, rtol=1e-3, atol=1e-3)


def test_the_host_waits_twice_in_a_round_of_an_inversion(device, monkeypatch, ddim):
    """For which rows are next, of which one scan takes those next to the image and one the others, and for what came
    of them."""
    device.watch(monkeypatch, EquilibriumStep, "run", "round")
    inverter = dq.DEQInverter(Net(device), ddim(20), method="equilibrium")
    with device:
        found = inverter.invert(start((1, 3, 8, 8)).to("cuda:0"))
    assert device.launches["round"]["deqdiff_fast.inverse_scan.default"] == found.stats.rounds > 2
    assert len(device.waits["round"]) == 2 * found.stats.rounds


def test_a_model_that_breaks_in_an_inversion_is_named(device, ddim):
    net = Net(device)
    with device, pytest.raises(dq.NonFiniteError, match="timestep 500"):
        dq.DEQInverter(
            lambda x, t: torch.where((t == 500)[:, None, None, None], float("nan") * x, net(x, t)), ddim(20)
        ).invert(start().to("cuda:0"))


def test_a_broken_model_is_named(device, ddim):
    net = Net(device)
    with device, pytest.raises(dq.NonFiniteError, match="timestep 500"):
        dq.DEQSampler(
            lambda x, t: torch.where((t == 500)[:, None, None, None], float("nan") * x, net(x, t)), ddim(20), window=20
        ).sample(start().to("cuda:0"))


@pytest.mark.parametrize("window", [60, 15])
@pytest.mark.parametrize("solver", ["quasi-newton", "draft", "triangular", "picard", "paradigms"])
def test_the_host_waits_for_no_round(device, monkeypatch, ddim, solver, window):
    """In the loop, whose decisions are read late; in rounds on nodes it looks once at each of them."""
    device.watch(monkeypatch, DeviceLoop, "queue", "round")
    device.watch(monkeypatch, NodeRounds, "_advance", "nodes")
    device.watch(monkeypatch, NodeRounds, "_estimate_error", "estimate")
    device.watch(monkeypatch, AsyncReadback, "read", "mail")
    stats = sampled(device, ddim(60), solver=solver, window=window)
    assert device.launches["round"].total() >= 5 * (stats.rounds - stats.node_rounds)
    assert (device.launches["nodes"].total() > 0) == (stats.node_rounds > 0)
    assert device.waits["round"] == []
    assert solver == "draft" or device.waits["nodes"] == [], "a draft's sweeps end when they have settled"
    assert device.waits["other"], "the noise is looked at before"


@pytest.mark.parametrize("kind", ["ddim", "ddpm", "multistep"])
def test_the_host_waits_for_no_serial_step(device, monkeypatch, ddim, kind):
    """Neither in the plain chain nor in memory of the solver, which keeps all states; NaN is looked for at the end."""
    steps = {"ddim": ddim(40), "ddpm": ddim(40, 1.0)}
    schedule = steps.get(kind) or dq.Schedule.from_sigmas(torch.linspace(5, 0, 41), method="dpmpp_2m")
    device.watch(monkeypatch, PlainChain, "advance", "plain")
    device.watch(monkeypatch, solve, "finish_serially", "kept")
    with device:
        sampler = dq.DEQSampler(Net(device), schedule)
        plain = sampler.serial(start().to("cuda:0"))
        kept = sampler.serial(start().to("cuda:0"), return_trajectory=True)
    assert device.launches["plain"].total() >= 2 * 40
    assert device.launches["kept"].total() >= 2 * 40
    assert device.waits["plain"] == []
    assert len(device.waits["kept"]) == 1, "at the end"
    if kind != "ddpm":
        torch.testing.assert_close(plain.sample.held, kept.sample.held, rtol=1e-5, atol=1e-5)


def test_the_host_waits_for_no_step_where_only_some_samples_are_left(device, ddim):
    """But for a copy of which ones these are."""
    with device:
        options = dq.DEQSampler(Net(device), ddim(30)).options
        system = options.system(start().to("cuda:0"), None)
        work = Workspace.open(system, Picard(), 1, options.memory, options.backend)
        with work.lease:
            work.begin(start().to("cuda:0"), None)
            whole = [0] * system.batch
            finish_serially(work, whole, 0, None)
            expected = work.chain.states[-1].held.clone()
            work.chain.states[10:].zero_()
            front = [9, *[4] * (system.batch - 1)]
            with device.doing("steps"):
                finish_serially(work, front, 0, None)
            found = work.chain.states[-1].held.clone()
    assert front == whole == [30] * system.batch
    assert device.launches["steps"].total() >= 2 * 26
    assert len(device.waits["steps"]) == 2, "that copy, and a look for NaN at the end"
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_what_is_on_two_devices_is_refused(device):
    with device:
        there = torch.ones(3).to("cuda:0")
        with pytest.raises(AssertionError, match="two devices"):
            there + torch.ones(3)
        assert (there + torch.tensor(1.0)).device == there.device
        assert (there[1:] * 2).held.tolist() == [2, 2]
        assert not device.waits["looking"]
        for look in (
            lambda: there.sum().item(),
            lambda: bool(there.any()),
            lambda: there.cpu(),
            lambda: there.tolist(),
            lambda: there.to("cpu"),
            lambda: torch.ones(3).to("cuda:0"),
            lambda: torch.tensor([1.0], device=there.device),
            lambda: there.copy_(torch.zeros(3)),
            lambda: torch.zeros(3).copy_(there),
            lambda: there[torch.tensor([0])],
            lambda: there.nonzero(),
        ):
            with device.doing("looking"):
                before = len(device.waits["looking"])
                look()
                assert len(device.waits["looking"]) == before + 1
        with device.doing("queueing"):
            torch.zeros(3).copy_(there, non_blocking=True)
            there.copy_(torch.zeros(3), non_blocking=True)
        assert not device.waits["queueing"]
        assert device.launches["queueing"]["aten.copy_.default"] >= 1
