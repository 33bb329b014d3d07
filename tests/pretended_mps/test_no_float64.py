"""On a device without float64 everything runs, with the results of the CPU."""

from __future__ import annotations

import pytest
import torch

import deqdiff_fast as dq
from deqdiff_fast.integrations.k_diffusion import sample_deq

pytestmark = pytest.mark.filterwarnings("ignore")
T = 12
SCHEDULES = {
    "one step": dq.Schedule.ddim(torch.linspace(0.9999, 0.98, 1000).cumprod(0), torch.arange(0, 1000, 83)[:T].flip(0)),
    "two lags": dq.Schedule.from_sigmas([*torch.logspace(1, -1, T).tolist(), 0.0], "dpmpp_2m"),
    "noise": dq.Schedule.ddpm(torch.linspace(0.9999, 0.98, 1000).cumprod(0), torch.arange(0, 1000, 83)[:T].flip(0)),
}
SOLVERS = ("auto", "quasi-newton", "picard", "anderson", "triangular", "deq-ddim", "paradigms", "parataa", "parareal")
METHODS = ("equilibrium", "fixed_point", "ddim", "auto")
SIGMAS = [10.0, 5.0, 2.0, 1.0, 0.5, 0.0]


def model(x, t):
    return 0.9 * x + 0.05 * torch.sin(2 * x + (0.001 * t.to(x.dtype)).view(-1, 1, 1, 1))


def denoiser(x, sigma):
    return x / (1 + sigma.view(-1, 1, 1, 1) ** 2)


def noise(scale=1.0):
    return scale * torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def compare(device, run, *inputs):
    """run(*tensors) on the CPU and there."""
    expected = run(*inputs)
    with device:
        found = run(*(x.to("mps:0") for x in inputs))
        assert found.device.type == "mps"
        found = found.cpu()
    assert found.dtype == expected.dtype
    assert (found - expected).norm() <= 1e-2 * expected.norm()


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers(device, solver, name):
    if solver == "parareal" and name == "two lags":
        pytest.skip("for one-step schedules")

    def run(x):
        generator = torch.Generator().manual_seed(3)
        return dq.DEQSampler(model, SCHEDULES[name], solver=solver, tol=1e-4).sample(x, generator=generator).sample

    compare(device, run, noise())


@pytest.mark.parametrize(
    "options",
    [
        {"solver": dq.QuasiNewton(nodes=False)},
        {"solver": dq.QuasiNewton(nodes=False), "window": 6},
        {"certify": "full"},
        {"spectrum": dq.SpectralSlope.fit(torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1)))},
    ],
)
def test_options(device, options):
    compare(
        device, lambda x: dq.DEQSampler(model, SCHEDULES["one step"], tol=1e-4, **options).sample(x).sample, noise()
    )


def test_the_serial_chain_and_guidance(device):
    compare(device, lambda x: dq.DEQSampler(model, SCHEDULES["two lags"]).serial(x).sample, noise())

    def run(x, c):
        guided = dq.guided(lambda x, t, c: model(x, t) * c.view(-1, 1, 1, 1), c, torch.zeros_like(c), 2.0)
        return dq.DEQSampler(guided, SCHEDULES["one step"], tol=1e-4).sample(x).sample

    compare(device, run, noise(), torch.tensor([0.5, 0.6]))


@pytest.mark.parametrize("name", ["one step", "two lags"])
@pytest.mark.parametrize("method", METHODS)
def test_inversion(device, method, name):
    if name == "two lags" and method == "ddim":
        pytest.skip("a method of one-step schedules")
    image = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(5)) - 0.5
    compare(device, lambda x: dq.DEQInverter(model, SCHEDULES[name], method, on_failure="warn").invert(x).noise, image)


@pytest.mark.parametrize("method", ["euler", "dpmpp_2m"])
def test_k_diffusion(device, method):
    sigmas = torch.tensor(SIGMAS)
    compare(device, lambda x, s: sample_deq(denoiser, x, s, disable=True, method=method), noise(10.0), sigmas)
