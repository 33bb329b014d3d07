"""Parareal where the model or the chain fails, and what is refused."""

from __future__ import annotations

import pytest
import torch

import deqdiff_fast as dq
from deqdiff_fast.solver import Parareal, resolve

pytestmark = pytest.mark.usefixtures("rows_are_known")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("timestep", "step", "round"), [(450, 10, 3), (400, 11, 5), (950, 0, 1)])
def test_a_model_that_fails_is_named(mixture, ddim, noise, value, timestep, step, round):
    """Blocks of 20 steps begin with steps 0, 5, 10 and 15, which the first sweep asks for; the others come after it."""
    model = mixture()

    def broken(x, t):
        out = model(x, t)
        out[t == timestep] = value
        return out

    with pytest.raises(dq.NonFiniteError, match=rf"NaN or Inf at timestep {timestep} .* sample 0") as caught:
        dq.DEQSampler(broken, ddim(20), solver="parareal").sample(noise(2))
    assert (caught.value.step, caught.value.round) == (step, round)


def test_a_chain_that_overflows(ddim, noise):
    with pytest.raises(dq.NonFiniteError, match="timestep"):
        dq.DEQSampler(lambda x, t: 1e12 * x, ddim(20), solver="parareal").sample(noise(1))


def test_a_wild_iterate_is_not_the_models_fault(ddim, noise, relative_error):
    """Long steps of a stiff linear model overflow; its own steps shrink the state."""
    schedule = ddim(100)
    stiffness = torch.zeros(1000)
    stiffness[schedule.timesteps] = (-1.5 / schedule.model_coef[:, 0]).float()

    def stiff(x, t):
        return stiffness[t][:, None, None, None] * 1e3 * torch.expm1((x - 0.7) / 1e3)

    sampler = dq.DEQSampler(stiff, schedule, solver="parareal", tol=1e-4)
    out = sampler.sample(noise(2))
    assert out.stats.repairs > 0
    assert out.converged.all()
    assert relative_error(out.sample, sampler.serial(noise(2)).sample).max() <= 1e-4


def test_what_is_refused(mixture, ddim, karras, noise):
    multistep = dq.Schedule.from_sigmas(karras(20), method="dpmpp_2m")
    with pytest.raises(ValueError, match="solver: 'parareal' expected a schedule whose steps look one state back"):
        dq.DEQSampler(mixture(), multistep, solver="parareal")
    with pytest.raises(ValueError, match="window: expected 'auto' or at least T = 20 for 'parareal', got 10"):
        dq.DEQSampler(mixture(), ddim(20), solver="parareal", window=10)
    with pytest.raises(ValueError, match="blocks: expected at most T = 20, got 21"):
        dq.DEQSampler(mixture(), ddim(20), solver=Parareal(blocks=21))
    plain = ddim(20)
    blind = dq.Schedule(
        plain.timesteps, plain.input_scale, plain.state_coef, plain.model_coef, plain.noise_coef, plain.signal,
        plain.sigma, x0_coef=torch.tensor([1.0, 0.0]).expand(20, 2),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"holds the predicted clean sample .* got none at step 0 of 20"):
        dq.DEQSampler(mixture(), blind, solver="parareal").sample(noise(1))
    assert resolve("parareal") == Parareal()


@pytest.mark.parametrize("setting", [{"blocks": 0}, {"blocks": 2.0}, {"max_rounds": 0}, {"safety": 0.0}])
def test_bad_settings(setting):
    name, value = next(iter(setting.items()))
    with pytest.raises(ValueError, match=rf"{name}: expected .* got {value}"):
        Parareal(**setting)
