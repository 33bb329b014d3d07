"""Inversion of chains whose steps look several states back, by passes over a one-step chain."""

from __future__ import annotations

import pytest
import torch

import deqdiff_fast as dq
from deqdiff_fast.inversion.multistep import one_step

diffusers = pytest.importorskip("diffusers")

SHAPE = (3, 8, 8)
RULES = {
    "DPMSolverMultistepScheduler": {},
    "third order": {"solver_order": 3},
    "SDE": {"algorithm_type": "sde-dpmsolver++"},
    "UniPCMultistepScheduler": {},
    "DEISMultistepScheduler": {},
    "PNDMScheduler": {"skip_prk_steps": True},
    "with a Runge-Kutta start": {},
    "HeunDiscreteScheduler": {},
}


def schedule_of(rule: str, steps: int = 15) -> dq.Schedule:
    other = diffusers.PNDMScheduler if rule == "with a Runge-Kutta start" else diffusers.DPMSolverMultistepScheduler
    kind = getattr(diffusers, rule, other)
    return dq.Schedule.from_diffusers(kind(beta_schedule="linear", **RULES[rule]), steps)


def generator(schedule: dq.Schedule) -> torch.Generator | None:
    return torch.Generator().manual_seed(7) if schedule.stochastic else None


@pytest.fixture
def mixture(mixture):
    """The mixture, at the nearest timestep where a schedule has some in between."""

    def make():
        model = mixture()
        return lambda x, t: model(x, t.round().long())

    return make


@pytest.fixture
def image(mixture):
    def image(schedule: dq.Schedule, batch: int = 2) -> torch.Tensor:
        """Images like the model's, but none that its chain makes: samples with some grain."""
        start, grain = torch.randn(2, batch, *SHAPE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        start = start * schedule.init_noise_sigma
        sample = dq.DEQSampler(mixture(), schedule).serial(start, generator=generator(schedule)).sample
        return sample + 0.02 * grain

    return image


@pytest.mark.parametrize("rule", RULES)
def test_round_trip(mixture, image, relative_error, rule):
    model, schedule = mixture(), schedule_of(rule)
    assert schedule.lags > 1
    target, tol = image(schedule), 1e-3 if schedule.lags > 3 else 1e-5  # fourth order hangs together the most
    inv = dq.DEQInverter(model, schedule, tol=tol).invert(target, generator=generator(schedule))
    again = dq.DEQSampler(model, schedule).serial(inv.noise, generator=generator(schedule)).sample
    assert relative_error(again, target).max() <= tol
    assert inv.converged.all()
    assert torch.equal(inv.trajectory[0], inv.noise)
    assert "passes over the one-step chain" in " ".join(inv.stats.notes)
    plain = dq.DEQInverter(model, schedule, "ddim").invert(target, generator=generator(schedule))
    assert (20 * inv.error < plain.error).all()


def test_the_noise_is_that_of_the_sample(mixture, relative_error):
    model, schedule = mixture(), schedule_of("DPMSolverMultistepScheduler")
    start = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sample = dq.DEQSampler(model, schedule).serial(start).sample
    inv = dq.DEQInverter(model, schedule, tol=1e-8).invert(sample)
    assert inv.converged.all()
    assert relative_error(inv.noise, start).max() < 1e-4


@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_one_step_rule_is_that_of_ddim(ddim, eta, prediction):
    schedule = ddim(12, eta, prediction)
    plain = one_step(schedule)
    assert torch.allclose(plain.state_coef, schedule.state_coef, rtol=1e-9, atol=1e-12)
    assert torch.allclose(plain.model_coef, schedule.model_coef, rtol=1e-9, atol=1e-12)
    assert plain.draws.all()
    sigmas = [*torch.logspace(1, -1, 9, dtype=torch.float64).tolist(), 0.0]
    euler, multistep = (dq.Schedule.from_sigmas(sigmas, method=method) for method in ("euler", "dpmpp_2m"))
    assert multistep.lags > 1
    assert torch.allclose(one_step(multistep).state_coef, euler.state_coef, atol=1e-12)
    assert torch.allclose(one_step(multistep).model_coef, euler.model_coef, atol=1e-12)


def test_batches_are_independent(mixture, image, relative_error):
    model, schedule = mixture(), schedule_of("DPMSolverMultistepScheduler")
    target = image(schedule, 3)
    spectrum = dq.SpectralSlope.fit(target)
    inverter = dq.DEQInverter(model, schedule, tol=1e-6, spectrum=spectrum)
    together, alone = inverter.invert(target), inverter.invert(target[1:2])
    assert together.converged.all()
    assert relative_error(alone.reconstruction, together.reconstruction[1:2]).max() < 2e-6


def test_limits(mixture, image):
    """Rounds are counted over all passes and kept to; a callback stops; what is hopeless ends with the best noise."""
    model, schedule = mixture(), schedule_of("DPMSolverMultistepScheduler")
    target = image(schedule)
    short = dq.DEQInverter(model, schedule, tol=1e-6, max_rounds=12, on_failure="warn")
    with pytest.warns(dq.ConvergenceWarning):
        inv = short.invert(target)
    assert inv.stats.rounds <= 13, "the look at the last trajectory included"
    assert inv.stats.stop_reason == "max_rounds"
    assert not inv.converged.all()
    stopped = dq.DEQInverter(model, schedule, tol=1e-6).invert(target, callback=lambda info: info.round >= 2)
    assert stopped.stats.stop_reason == "callback"
    hopeless = dq.DEQInverter(lambda x, t: 30 * x.sin(), schedule, max_rounds=60).invert(target)
    assert not hopeless.converged.any()
    assert hopeless.noise.isfinite().all()
