"""`sample_deq` in the place of k-diffusion's samplers: by its contract, and with the package where it is installed."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch

import deqdiff_fast as dq
from deqdiff_fast.integrations.k_diffusion import sample_deq

ABAR = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)


class Discrete(torch.nn.Module):
    """DiscreteEpsDDPMDenoiser and DiscreteVDDPMDenoiser of k-diffusion 0.1.1, with interpolated timesteps."""

    def __init__(self, inner_model, alphas_cumprod, quantize, v=False):
        super().__init__()
        self.inner_model, self.v = inner_model, v
        self.register_buffer("log_sigmas", ((1 - alphas_cumprod) / alphas_cumprod).sqrt().log())

    def sigma_to_t(self, sigma):
        low = (sigma.log() >= self.log_sigmas[:, None]).sum(0).sub(1).clamp(0, len(self.log_sigmas) - 2)
        a, b = self.log_sigmas[low], self.log_sigmas[low + 1]
        return (low + ((sigma.log() - a) / (b - a)).clamp(0, 1)).view(sigma.shape)

    def forward(self, input, sigma, **kwargs):
        wide = sigma[:, None, None, None]
        c_in = 1 / (wide**2 + 1).sqrt()
        out = self.inner_model(input * c_in, self.sigma_to_t(sigma), **kwargs)
        return input / (wide**2 + 1) - out * wide * c_in if self.v else input - out * wide


def euler(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Karras et al. 2022, algorithm 2 without churn, as k-diffusion's sample_euler."""
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i] * x.new_ones(len(x)), **(extra_args or {}))
        (callback or dict)({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
        x = x + (x - denoised) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
    return x


def dpmpp_2m(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Lu et al. 2022, algorithm 2, as k-diffusion's sample_dpmpp_2m."""
    before = None
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i] * x.new_ones(len(x)), **(extra_args or {}))
        (callback or dict)({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
        h, used = (sigmas[i] / sigmas[i + 1]).log(), denoised
        if before is not None and sigmas[i + 1] > 0:
            r = (sigmas[i - 1] / sigmas[i]).log() / h
            used = (1 + 1 / (2 * r)) * denoised - 1 / (2 * r) * before
        x = sigmas[i + 1] / sigmas[i] * x - (-h).expm1() * used
        before = denoised
    return x


@pytest.fixture(params=["contract", "package"])
def kd(request):
    """Wrappers and samplers: those above, or k-diffusion's."""
    if request.param == "contract":
        return SimpleNamespace(eps=Discrete, v=functools.partial(Discrete, v=True), euler=euler, dpmpp_2m=dpmpp_2m)
    package = pytest.importorskip("k_diffusion", exc_type=ImportError)
    wrappers, samplers = package.external, package.sampling
    return SimpleNamespace(
        eps=wrappers.DiscreteEpsDDPMDenoiser,
        v=wrappers.DiscreteVDDPMDenoiser,
        euler=samplers.sample_euler,
        dpmpp_2m=samplers.sample_dpmpp_2m,
    )


class Prompted(torch.nn.Module):
    """An eps or v network on fractional timesteps with a conditioning for each row."""

    def __init__(self, mixture, prediction):
        super().__init__()
        self.inner = mixture(prediction=prediction)

    def forward(self, x, t, cond=None):
        low = t.floor().long().clamp(0, 998)
        part = (t - low)[:, None, None, None]
        out = (1 - part) * self.inner(x, low) + part * self.inner(x, low + 1)
        return out if cond is None else out + 0.3 * torch.tanh(cond)[:, :, None, None]


class CFG(torch.nn.Module):
    """The guidance wrapper of k-diffusion's own sampling script."""

    def __init__(self, inner_model):
        super().__init__()
        self.inner_model = inner_model

    def forward(self, x, sigma, uncond, cond, scale):
        both = self.inner_model(torch.cat([x, x]), torch.cat([sigma, sigma]), cond=torch.cat([uncond, cond]))
        low, high = both.chunk(2)
        return low + (high - low) * scale


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("method", ["euler", "dpmpp_2m"])
def test_the_result_and_the_callbacks_of_k_diffusion(kd, karras, mixture, noise, relative_error, prediction, method):
    network = Prompted(mixture, {"eps": "epsilon", "v": "v_prediction"}[prediction])
    model = CFG(getattr(kd, prediction)(network, ABAR.float(), quantize=False))
    sigmas, x = karras(), noise(3) * 14.0
    draw = torch.Generator().manual_seed(2)
    extra = {"cond": torch.randn(3, 3, generator=draw), "uncond": torch.zeros(3, 3), "scale": 2.5}
    wanted, seen, reports = [], [], []
    with torch.no_grad():
        expected = getattr(kd, method)(model, x, sigmas, extra_args=extra, callback=wanted.append, disable=True)
    got = sample_deq(
        model, x, sigmas, extra_args=extra, callback=seen.append, disable=True, method=method, tol=1e-5, window=12,
        report=reports.append,
    )  # fmt: skip
    assert relative_error(got, expected).max() < 1e-4
    assert [step["i"] for step in seen] == list(range(20))
    for ours, theirs in zip(seen, wanted, strict=True):
        assert set(ours) == set(theirs)
        assert ours["sigma"] == theirs["sigma"] == ours["sigma_hat"]
        assert relative_error(ours["x"], theirs["x"]).max() < 1e-4
        assert relative_error(ours["denoised"], theirs["denoised"]).max() < 1e-3
    assert reports[0].converged.all()
    assert reports[0].stats.rounds < 20


def test_steps_finished_serially_are_called_back_too(karras, mixture, noise, relative_error):
    model, seen = Discrete(Prompted(mixture, "epsilon"), ABAR.float(), False), []
    x, sigmas = noise(2) * 14.0, karras()
    got = sample_deq(model, x, sigmas, None, seen.append, True, max_rounds=2)
    assert [step["i"] for step in seen] == list(range(20))
    with torch.no_grad():
        assert relative_error(got, euler(model, x, sigmas)).max() < 1e-2


def test_an_exception_in_the_callback_ends_the_solve(karras, mixture, noise):
    model, calls = Discrete(Prompted(mixture, "epsilon"), ABAR.float(), False), []

    def interrupt(step):
        calls.append(step["i"])
        if step["i"] == 2:
            raise InterruptedError

    for _ in range(2):  # the memory of the first solve is free again
        with pytest.raises(InterruptedError):
            sample_deq(model, noise(1) * 14.0, karras(), callback=interrupt, disable=True)
    assert calls == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_sigma_has_the_dtype_of_x(karras, mixture, noise, dtype):
    seen = set()

    def model(x, sigma):
        seen.add((x.dtype, sigma.dtype))
        return 0.3 * x / (1 + sigma[:, None, None, None] ** 2)

    assert sample_deq(model, noise(2).to(dtype), karras(5), disable=True).dtype == dtype
    assert seen == {(dtype, dtype)}


def test_flow_matching_models(mixture, noise, relative_error):
    inner, sigmas, x = mixture(prediction="sample"), torch.linspace(0.99, 0, 31), noise(2)

    def model(x, sigma):  # states (1 - s) x0 + s noise, seen by a model that wants unit variance
        wide = sigma[:, None, None, None]
        level = ((1 - sigma) ** 2 / (sigma**2 + (1 - sigma) ** 2)).double()
        step = (ABAR[:, None] > level).sum(0).clamp(0, 999)
        return inner(x / (wide**2 + (1 - wide) ** 2).sqrt(), step)

    with torch.no_grad():
        expected = euler(model, x, sigmas)
    assert relative_error(sample_deq(model, x, sigmas, disable=True, tol=1e-4), expected).max() < 1e-3


def test_guided_models(karras, mixture, noise, relative_error):
    inner = Discrete(Prompted(mixture, "epsilon"), ABAR.float(), False)
    cond, uncond = torch.randn(3, 3, generator=torch.Generator().manual_seed(1)), torch.zeros(1, 3)
    model = dq.guided(inner, {"cond": cond}, {"cond": uncond}, 2.0)
    x, sigmas = noise(3) * 14.0, karras()
    got = sample_deq(model, x, sigmas, disable=True, tol=1e-5)
    extra = {"cond": cond, "uncond": uncond.expand(3, 3), "scale": 2.0}
    with torch.no_grad():
        expected = euler(CFG(inner), x, sigmas, extra)
    assert relative_error(got, expected).max() < 1e-4
