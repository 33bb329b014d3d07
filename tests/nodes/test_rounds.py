"""Solves by rounds on nodes against the serial chain, on exact mixtures."""

from __future__ import annotations

import pytest
import torch

import deqdiff_fast as dq
from deqdiff_fast.solver import QuasiNewton

pytestmark = pytest.mark.usefixtures("rows_are_known")

TOL = 1e-2


def seeded():
    return torch.Generator().manual_seed(1)


@pytest.fixture
def solved(relative_error):
    """(solution, (B,) true errors) of a solve from `noise`; seen: not the model's first."""

    def solve(model, schedule, noise, call=None, seen=False, **settings):
        sampler = dq.DEQSampler(model, schedule, **{"solver": "quasi-newton"} | settings)
        if seen:
            sampler.sample(noise, generator=seeded())
        found = sampler.sample(noise, generator=seeded(), **(call or {}))
        return found, relative_error(found.sample, sampler.serial(noise, generator=seeded()).sample)

    return solve


@pytest.mark.parametrize("eta", [0.0, 0.5])
@pytest.mark.parametrize(("steps", "batch"), [(1, 2), (2, 1), (3, 2), (4, 2), (16, 2), (50, 1), (50, 3), (100, 3)])
def test_the_serial_sample(mixture, ddim, noise, solved, steps, batch, eta):
    found, error = solved(mixture(), ddim(steps, eta), noise(batch))
    assert found.converged.tolist() == [True] * batch
    assert error.max() < TOL
    assert 0 < found.stats.timesteps_evaluated <= 1


def test_a_long_chain_takes_few_evaluations(mixture, ddim, noise, solved):
    model, schedule, x = mixture(), ddim(1000), noise(3)
    found, error = solved(model, schedule, x, seen=True)
    assert bool(found.converged.all())
    assert error.max() < TOL
    assert found.stats.stop_reason == "converged"
    assert found.stats.node_rounds == found.stats.rounds <= 12
    assert found.stats.model_evals < 0.4 * 3 * 1000
    assert found.stats.timesteps_evaluated < 0.2
    assert found.stats.check_evals <= 2


def test_a_long_stochastic_chain(mixture, ddim, noise, solved):
    found, error = solved(mixture(), ddim(1000, 0.5), noise(1))
    assert bool(found.converged.all())
    assert error.max() < TOL


@pytest.mark.parametrize("tol", [1e-1, 1e-3, 1e-4])
@pytest.mark.parametrize("shape", [(64,), (2, 32), (3, 4, 4, 4), (1, 8, 8)], ids=["vector", "1-D", "video", "grey"])
def test_any_shape(mixture, ddim, noise, solved, shape, tol):
    found, error = solved(mixture(shape), ddim(100), noise(2, shape, seed=1), seen=True, tol=tol)
    assert bool(found.converged.all())
    assert error.max() < tol
    if tol > 1e-2:
        assert found.stats.timesteps_evaluated < 0.5


@pytest.mark.parametrize("prediction", ["sample", "v_prediction"])
def test_any_prediction_type(mixture, ddim, noise, solved, prediction):
    found, error = solved(mixture(prediction=prediction), ddim(50, 0.0, prediction), noise(2))
    assert bool(found.converged.all())
    assert error.max() < TOL


def test_float64(mixture, ddim, noise, solved):
    found, error = solved(mixture(), ddim(50), noise(2, dtype=torch.float64), tol=1e-7)
    assert bool(found.converged.all())
    assert found.sample.dtype == torch.float64
    assert error.max() < 1e-7


def test_bfloat16(mixture, ddim, noise, solved):
    found, error = solved(mixture(), ddim(50), noise(2).bfloat16())
    assert bool(found.converged.all())
    assert found.sample.dtype == torch.bfloat16
    assert error.max() < TOL


def evaluations(model, schedule, x, nodes):
    sampler = dq.DEQSampler(model, schedule, solver=QuasiNewton(nodes=nodes))
    return sampler.sample(x, generator=seeded()).stats.model_evals


def test_bfloat16_costs_no_more_than_without_nodes(mixture, ddim, noise):
    plain, noises = mixture(), [noise(2, seed=seed).bfloat16() for seed in range(4)]
    on_nodes, without = (sum(evaluations(plain, ddim(50), x, nodes) for x in noises) for nodes in (True, False))
    assert on_nodes < without


@pytest.mark.parametrize(("steps", "eta"), [(20, 0.5), (100, 0.5), (20, 1.0), (100, 1.0)])
def test_a_stochastic_chain_costs_hardly_more_than_without_nodes(mixture, ddim, noise, steps, eta):
    model, schedule, x = mixture(), ddim(steps, eta), noise(2)
    assert evaluations(model, schedule, x, True) < 1.25 * evaluations(model, schedule, x, False)


def sigma_mixture(mixture):
    """The clean sample of a mixture, by its noise level, as k-diffusion's models are called."""
    given = mixture()

    def model(x, sigma):
        flat, square = x.double().flatten(1), sigma.double()[:, None].square()
        offset = flat[:, None] - given.means
        share = (-offset.square().sum(-1) / (2 * (given.variance + square))).softmax(-1)
        step = square * (share[..., None] * offset).sum(1) / (given.variance + square)
        return (flat - step).view_as(x).to(x.dtype)

    return model


@pytest.mark.parametrize("method", ["euler", "dpmpp_2m"])
@pytest.mark.parametrize("steps", [12, 50, 1000])
def test_noise_levels(mixture, karras, noise, solved, method, steps):
    schedule = dq.Schedule.from_sigmas(karras(steps), method)
    found, error = solved(sigma_mixture(mixture), schedule, noise(2) * schedule.init_noise_sigma, seen=True)
    assert bool(found.converged.all())
    assert error.max() < TOL
    assert steps < 1000 or found.stats.timesteps_evaluated < 0.2


def test_batch_mates_do_not_matter(mixture, ddim, noise, relative_error):
    sampler, x = dq.DEQSampler(mixture(), ddim(100), solver="quasi-newton"), noise(3)
    together, exact = sampler.sample(x).sample, sampler.serial(x).sample
    for b in range(3):
        alone = sampler.sample(x[b : b + 1]).sample
        assert relative_error(alone, together[b : b + 1]).item() < TOL
        assert relative_error(alone, exact[b : b + 1]).item() < TOL


@pytest.mark.parametrize("spoiled", [0.0, 0.05])
def test_a_draft(mixture, ddim, noise, solved, spoiled):
    draft = mixture()
    draft.means *= 1 + spoiled
    found, error = solved(mixture(), ddim(100), noise(2), solver="draft", draft=draft)
    assert bool(found.converged.all())
    assert error.max() < TOL
    assert found.stats.draft_evals > 0


@pytest.mark.parametrize("spoiled", [0.0, 0.05])
def test_a_good_draft_takes_no_more_rounds_than_none(mixture, ddim, noise, solved, spoiled):
    draft = mixture()
    draft.means *= 1 + spoiled
    found, _ = solved(mixture(), ddim(100), noise(2), solver="draft", draft=draft)
    assert found.stats.rounds <= solved(mixture(), ddim(100), noise(2))[0].stats.rounds


@pytest.mark.parametrize("scale", [3.0, -1.0])
def test_a_bad_draft_is_right_all_the_same(mixture, ddim, noise, solved, scale):
    model, other = mixture(), mixture()
    found, error = solved(model, ddim(50), noise(2), solver="draft", draft=lambda x, t: scale * other(x, t))
    assert bool(found.converged.all())
    assert error.max() < TOL


SWITCHES = {
    "gain": lambda out, there: out * torch.where(there, 1.0, 0.8),
    "shift": lambda out, there: out + torch.where(there, 0.3, 0.0),
}


@pytest.mark.parametrize("at", [1, 4, 9, 16, 22, 28, 33, 37, 43, 47, 49])
@pytest.mark.parametrize("kind", SWITCHES)
def test_a_model_that_switches_in_time_is_never_far_off(mixture, ddim, noise, solved, kind, at):
    given, schedule = mixture(), ddim(50)
    cut = schedule.timesteps[at]

    def model(x, t):
        return SWITCHES[kind](given(x, t), (t >= cut).view(-1, 1, 1, 1))

    found, error = solved(model, schedule, noise(2, seed=at))
    assert not bool((found.converged & (error > 3 * TOL)).any())


@pytest.mark.parametrize("at", [2, 7, 15, 26, 36, 46])
def test_a_guidance_interval_is_never_far_off(mixture, ddim, noise, solved, at):
    with_prompt, without, schedule = mixture(), mixture(), ddim(50)
    without.means = without.means.flip(0) * 0.5
    low, high = schedule.timesteps[min(at + 3, 49)], schedule.timesteps[at]

    def model(x, t):
        out = with_prompt(x, t)
        inside = ((t >= low) & (t <= high)).view(-1, 1, 1, 1)
        return torch.where(inside, out + 2 * (out - without(x, t)), out)

    found, error = solved(model, schedule, noise(2, seed=at))
    assert not bool((found.converged & (error > 3 * TOL)).any())


@pytest.mark.parametrize("steps", [10, 16])
def test_third_order_costs_hardly_more_than_without_nodes(mixture, noise, steps):
    diffusers = pytest.importorskip("diffusers")
    schedule = dq.Schedule.from_diffusers(diffusers.DEISMultistepScheduler(solver_order=3), steps)
    assert schedule.lags == 3
    model, x, rough = mixture(), noise(2), torch.linspace(0, 600, 1000).sin() * 0.1

    def uneven(x, t):  # in time, as networks are
        return model(x, t.long()) * (1 + rough[t.long()]).view(-1, 1, 1, 1)

    assert evaluations(uneven, schedule, x, True) < 1.25 * evaluations(uneven, schedule, x, False)
