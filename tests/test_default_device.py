"""Under `torch.set_default_device` everything is as without: our tables lie on the CPU, a user's code finds its own."""

from __future__ import annotations

import pytest
import torch

import deqdiff_fast as dq
from deqdiff_fast.integrations.k_diffusion import sample_deq

STEPS, SHAPE = 12, (1, 3, 8, 8)
ALPHAS = torch.linspace(0.9999, 0.98, 1000).cumprod(0)
TIMES = torch.arange(0, 1000, 1000 // STEPS)[:STEPS].flip(0)
SIGMAS = torch.tensor([10.0, 5.0, 2.0, 1.0, 0.5, 0.0])
NOISE = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
SOLVERS = ("auto", "quasi-newton", "picard", "anderson", "triangular", "deq-ddim", "paradigms", "parataa", "parareal")
METHODS = ("equilibrium", "fixed_point", "ddim", "gradient")


class Net(torch.nn.Module):
    """A small network that notes which default device it finds."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.layer = torch.nn.Conv2d(3, 3, 3, padding=1)
        with torch.no_grad():
            for weight in self.parameters():
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
        self.found = set()

    def forward(self, x, t):
        self.found.add(torch.empty(0).device.type)
        return 0.8 * torch.tanh(self.layer(x))


@pytest.fixture
def elsewhere():
    """To be called where the default device should become another one: no number can be read there."""
    yield lambda: torch.set_default_device("meta")
    torch.set_default_device(None)
    vars(torch._GLOBAL_DEVICE_CONTEXT).pop("device_context", None)  # torch 2.6 keeps a None that others trip over


def schedule():
    return dq.Schedule.ddim(ALPHAS, TIMES)


def sample(solver):
    net = Net().requires_grad_(False)
    return lambda: dq.DEQSampler(net, schedule(), solver=solver, tol=1e-4).sample(NOISE).sample, net


def backward(gradient):
    net = Net()

    def run():
        net.zero_grad()
        dq.DEQSampler(net, schedule(), gradient=gradient, tol=1e-4).sample(NOISE).sample.square().sum().backward()
        return net.layer.weight.grad.clone()

    return run, net


def invert(method):
    net, options = Net().requires_grad_(False), {"max_rounds": 4} if method == "gradient" else {}
    settings = {"on_failure": "warn"} | options
    return lambda: dq.DEQInverter(net, schedule(), method, **settings).invert(NOISE * 0.3).noise, net


def guided():
    net = Net().requires_grad_(False)
    model = dq.guided(lambda x, t, c: net(x, t) * c.view(-1, 1, 1, 1), torch.ones(1, 1), torch.zeros(1, 1), 3.0)
    return lambda: dq.DEQSampler(model, schedule(), tol=1e-4).sample(NOISE).sample, net


def k_diffusion():
    net = Net().requires_grad_(False)
    return lambda: sample_deq(lambda x, sigma: net(x, sigma), 10 * NOISE, SIGMAS, disable=True), net


def tables():
    images = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(2))

    def run():
        chain = dq.Schedule.from_sigmas(SIGMAS)
        slope = dq.SpectralSlope.fit(images)
        return torch.cat(
            [chain.slope(0.5), chain.path_error(), schedule().denoised_coef()[:, 0], slope.variance.flatten()]
        )

    return run, None


RUNS = {f"solver {name}": lambda name=name: sample(name) for name in SOLVERS}
RUNS |= {
    f"gradient {name}": lambda name=name: backward(name) for name in ("implicit", "phantom", "unrolled", "reversible")
}
RUNS |= {f"invert {name}": lambda name=name: invert(name) for name in METHODS}
RUNS |= {"guided": guided, "sample_deq": k_diffusion, "tables": tables}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", RUNS)
def test_results_are_those_without_it_and_a_model_finds_its_own(name, elsewhere):
    run, net = RUNS[name]()
    expected = run()
    if net is not None:
        assert net.found == {"cpu"}
        net.found.clear()
    elsewhere()
    found = run()
    torch.set_default_device(None)
    assert found.device.type == "cpu"
    assert (found - expected).norm() <= 1e-3 * expected.norm()
    if net is not None:
        assert net.found == {"meta"}


def test_callbacks_find_it_and_it_is_back_afterwards(elsewhere):
    found = []
    net = Net().requires_grad_(False)
    elsewhere()
    dq.DEQSampler(net, schedule(), solver="picard").sample(
        NOISE, callback=lambda info: found.append(torch.empty(0).device.type)
    )
    assert set(found) == {"meta"}
    assert torch.empty(0).device.type == "meta"
    with pytest.raises(ValueError, match="tol"):
        dq.DEQSampler(net, schedule(), tol=-1.0)
    assert torch.empty(0).device.type == "meta"


def test_a_diffusers_scheduler_is_probed(elsewhere):
    diffusers = pytest.importorskip("diffusers")
    for rule in ("DDIMScheduler", "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler"):
        scheduler = getattr(diffusers, rule)()
        expected = dq.Schedule.from_diffusers(scheduler, 9)
        elsewhere()
        found = dq.Schedule.from_diffusers(scheduler, 9)
        torch.set_default_device(None)
        for field in ("state_coef", "model_coef", "noise_coef", "signal", "sigma"):
            assert torch.equal(getattr(found, field), getattr(expected, field)), (rule, field)
