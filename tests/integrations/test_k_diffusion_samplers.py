"""`sample_deq(method=sampler)`: samplers with k-diffusion's contract, written out and, where it can be imported,
the package's own, each against its plain run."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest
import torch
from plain_samplers import (
    ones,
    sample_dpm_2,
    sample_dpmpp_2m_sde,
    sample_dpmpp_sde,
    sample_euler_ancestral,
    sample_heun,
    sample_lms,
)

import deqdiff_fast as dq
from deqdiff_fast.integrations.k_diffusion import sample_deq

OPTIONS = {"tol": 1e-5, "solver": "quasi-newton"}
SAMPLERS = {
    "heun": sample_heun,
    "heun-churned": partial(sample_heun, s_churn=3.0),
    "dpm_2": sample_dpm_2,
    "dpm_2-churned": partial(sample_dpm_2, s_churn=3.0),
    "lms": sample_lms,
    "lms-3": partial(sample_lms, order=3),
    "euler_ancestral": sample_euler_ancestral,
    "euler_ancestral-half": partial(sample_euler_ancestral, eta=0.5),
    "dpmpp_2m_sde": sample_dpmpp_2m_sde,
    "dpmpp_2m_sde-heun": partial(sample_dpmpp_2m_sde, solver_type="heun", eta=0.6),
    "dpmpp_2m_sde-still": partial(sample_dpmpp_2m_sde, eta=0.0),
    "dpmpp_sde": sample_dpmpp_sde,
}
OF_THE_PACKAGE = [
    "sample_euler", "sample_euler_ancestral", "sample_heun", "sample_dpm_2", "sample_dpm_2_ancestral", "sample_lms",
    "sample_dpmpp_2s_ancestral", "sample_dpmpp_sde", "sample_dpmpp_2m", "sample_dpmpp_2m_sde", "sample_dpmpp_3m_sde",
]  # fmt: skip


class Prompted(torch.nn.Module):
    """The denoiser of a Gaussian, bent, around a mean that comes with the sample."""

    def __init__(self):
        super().__init__()
        self.sigma_min, self.calls = 0.03, 0

    def forward(self, x, sigma, cond):
        self.calls += 1
        wide, mean = sigma[:, None, None, None], torch.tanh(cond)[:, :, None, None]
        return mean + torch.tanh(x - mean) * 0.4 / (0.4 + wide**2)


def compare(sampler, sigmas, relative_error, dtype=torch.float32, bound=1e-3):
    """The plain run and ours from the same state of torch's generator, callbacks and what is drawn next included."""
    own = torch.Generator().manual_seed(1)
    x = torch.randn(3, 3, 8, 8, generator=own).to(dtype) * sigmas[0].to(dtype)
    extra, model = {"cond": torch.randn(3, 3, generator=own).to(dtype)}, Prompted()
    seen, results, after, reports = ([], []), [], [], []
    for steps, function in zip(seen, (sampler, partial(sample_deq, method=sampler, **OPTIONS, report=reports.append))):
        torch.manual_seed(7)
        with torch.no_grad():
            results.append(function(model, x, sigmas.to(dtype), extra_args=extra, callback=steps.append, disable=True))
        after.append(torch.rand(3))
    assert torch.equal(*after)
    assert relative_error(results[1], results[0]).max() < bound
    assert [step["i"] for step in seen[1]] == [step["i"] for step in seen[0]]
    for wanted, ours in zip(*seen):
        assert set(ours) == set(wanted)
        assert torch.equal(ours["sigma"], wanted["sigma"])
        assert torch.equal(ours["sigma_hat"], wanted["sigma_hat"])
        assert relative_error(ours["x"], wanted["x"]).max() < bound
        assert relative_error(ours["denoised"], wanted["denoised"]).max() < 3 * bound
    assert reports[0].converged.all()
    return reports[0].stats


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_picture_of_the_sampler_itself(karras, relative_error, name):
    sigmas = karras(14)
    stats = compare(SAMPLERS[name], sigmas, relative_error)
    assert stats.finished_serially == 0
    assert stats.rounds < 14 * (2 if "2" in name or "heun" in name else 1)


@pytest.mark.parametrize("name", ["heun", "lms", "euler_ancestral", "dpmpp_sde"])
def test_other_dtypes(karras, relative_error, name):
    compare(SAMPLERS[name], karras(8), relative_error, torch.float64, 1e-4)
    compare(SAMPLERS[name], karras(8), relative_error, torch.bfloat16, 5e-2)


@pytest.mark.parametrize("name", OF_THE_PACKAGE)
def test_the_samplers_of_the_package(karras, relative_error, name):
    package = pytest.importorskip("k_diffusion.sampling", exc_type=ImportError)
    compare(getattr(package, name), karras(10), relative_error)


def test_noise_samplers_are_asked_for_what_they_would_be_asked_for(karras, noise, relative_error):
    """Also one of the caller's own: in order, once each."""
    asked = []

    def own(sigma, after):
        asked[-1].append((float(sigma), float(after)))
        return torch.randn(2, 3, 8, 8, generator=draws)

    model, results = (lambda x, sigma: torch.tanh(x) / (1 + sigma[:, None, None, None])), []
    for function in (sample_euler_ancestral, sample_deq):
        asked.append([])
        draws = torch.Generator().manual_seed(3)
        given = partial(sample_euler_ancestral, noise_sampler=own)
        given = (given, {}) if function is sample_euler_ancestral else (function, {"method": given, **OPTIONS})
        results.append(given[0](model, noise(2) * 14, karras(9), disable=True, **given[1]))
    assert asked[0] == asked[1]
    assert relative_error(results[1], results[0]).max() < 1e-3


def adaptive(model, x, sigmas, extra_args=None, callback=None, disable=None):
    for now, after in pairwise(sigmas):
        slope = (x - model(x, ones(x, now))) / now
        x = x + slope * (after - now) * (1 if slope.norm() < 20 else 0.5)
    return x


def rescaled(model, x, sigmas, extra_args=None, callback=None, disable=None):
    return x / x.std() + model(x, ones(x, sigmas[0]))


def until_small(model, x, sigmas, extra_args=None, callback=None, disable=None):
    for sigma in sigmas[:-1]:
        x = model(x, ones(x, sigma))
        if x.flatten()[0] > 0:
            break
    return x


def multiplied(model, x, sigmas, extra_args=None, callback=None, disable=None):
    for sigma in sigmas[:-1]:
        x = model(x, ones(x, sigma)) + x * torch.randn_like(x)
    return x


def bounded(model, x, sigmas, extra_args=None, callback=None, disable=None):
    for now, after in pairwise(sigmas):
        x = x + (x - model(x, ones(x, now)).clamp(-6, 6)) / now * (after - now)
    return x


def weakened(model, x, sigmas, extra_args=None, callback=None, disable=None):
    for now, after in pairwise(sigmas):
        denoised = model(x, ones(x, now))
        x = x + (x - denoised * (0.5 if denoised.std() > 0.5 else 1.0)) / now * (after - now)
    return x


def otherwise(model, x, sigma_min, sigma_max, n, extra_args=None, callback=None, disable=None):
    return x


@pytest.mark.parametrize("sampler", [adaptive, rescaled, until_small, multiplied, bounded, weakened, otherwise])
def test_samplers_of_another_kind_are_refused_by_name_before_a_call(karras, noise, sampler):
    model = Prompted()
    with pytest.raises(dq.NotAffineError, match=rf"method: {sampler.__name__} cannot be solved in parallel .*\("):
        sample_deq(model, noise(2), karras(6), {"cond": torch.zeros(2, 3)}, method=sampler)
    assert model.calls == 0
