"""What the host does for a CUDA device, on one that is pretended: nothing is left on the other side, nobody waits."""

from __future__ import annotations

import pytest
import torch

import deqdiff_fast as dq
from deqdiff_fast.loop.coarse_grids import CoarseRounds
from deqdiff_fast.loop.device import DeviceLoop
from deqdiff_fast.loop.device_state import AsyncReadback


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


def test_a_broken_model_is_named(device, ddim):
    net = Net(device)
    with device, pytest.raises(dq.NonFiniteError, match="timestep 500"):
        dq.DEQSampler(
            lambda x, t: torch.where((t == 500)[:, None, None, None], float("nan") * x, net(x, t)), ddim(20), window=20
        ).sample(start().to("cuda:0"))


@pytest.mark.parametrize("window", [60, 15])
@pytest.mark.parametrize("solver", ["quasi-newton", "draft", "triangular", "picard", "paradigms"])
def test_the_host_waits_for_no_round(device, monkeypatch, ddim, solver, window):
    """Neither on coarse grids nor in the loop, whose verdicts come by mail."""
    device.watch(monkeypatch, DeviceLoop, "queue", "round")
    device.watch(monkeypatch, CoarseRounds, "run", "coarse")
    device.watch(monkeypatch, AsyncReadback, "read", "mail")
    stats = sampled(device, ddim(60), solver=solver, window=window)
    assert device.launches["round"].total() > 5 * (stats.rounds - stats.coarse_rounds)
    assert (device.launches["coarse"].total() > 0) == (stats.coarse_rounds > 0)
    assert device.waits["round"] == device.waits["coarse"] == []
    assert device.waits["other"], "the noise is looked at before"


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
