"""DEQInverter without gradients: the noise of an image, checked by the serial chain."""

from __future__ import annotations

import pytest
import torch

import deqdiff_fast as dq

SHAPE = (3, 8, 8)


ABAR = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)


def pictures(model, schedule, batch: int = 2, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Images like the model's, but none that its chain makes: samples with some grain."""
    draw = torch.Generator().manual_seed(3)
    start, grain = torch.randn(2, batch, *SHAPE, generator=draw, dtype=torch.float64)
    sample = dq.DEQSampler(model, schedule).serial(start, generator=draw).sample
    return (sample + 0.05 * grain).to(dtype)


def generators(batch: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(100 + b) for b in range(batch)]


@pytest.mark.parametrize("eta", [0.0, 0.3])
@pytest.mark.parametrize("steps", [20, 50])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_round_trip(mixture, ddim, relative_error, steps, eta, prediction):
    """An image that the chain never made, through the sampler's own serial chain."""
    model, schedule = mixture(prediction=prediction), ddim(steps, eta, prediction)
    image = pictures(model, schedule, 3)
    inv = dq.DEQInverter(model, schedule).invert(image, generator=generators(3))
    again = dq.DEQSampler(model, schedule).serial(inv.noise, generator=generators(3)).sample
    error = relative_error(again, image)
    assert error.max() <= 1e-3
    assert torch.allclose(error, inv.error, rtol=1e-6)
    assert inv.converged.all()
    assert torch.equal(again, inv.reconstruction)
    assert inv.noise.dtype == image.dtype
    assert torch.equal(inv.trajectory[0], inv.noise)
    assert torch.allclose(inv.trajectory[-1], image, atol=1e-6)
    serial = dq.DEQInverter(model, schedule, "fixed_point").invert(image, generator=generators(3))
    assert serial.converged.all() or eta > 0, "with frozen noise it may diverge"
    assert 4 * inv.stats.rounds <= serial.stats.rounds


@pytest.mark.parametrize("eta", [0.0, 0.3])
def test_double_precision_to_rounding_level(mixture, ddim, eta):
    model, schedule = mixture(), ddim(50, eta)
    image = pictures(model, schedule, 2, torch.float64)
    generator = torch.Generator().manual_seed(1)
    inv = dq.DEQInverter(model, schedule, tol=1e-7).invert(image, generator=generator)
    assert inv.error.max() <= 1e-7
    assert inv.converged.all()


def test_the_noise_is_that_of_the_sample(mixture, ddim, noise, relative_error):
    """A sample of the chain comes from the noise that made it."""
    model, schedule, start = mixture(), ddim(20), noise(3, dtype=torch.float64)
    sample = dq.DEQSampler(model, schedule).serial(start).sample
    inv = dq.DEQInverter(model, schedule, tol=1e-9).invert(sample)
    assert relative_error(inv.noise, start).max() < 1e-6


def test_twenty_times_better_than_ddim_inversion(mixture, ddim):
    model, schedule = mixture(), ddim(50)
    image = pictures(model, schedule, 3)
    plain = dq.DEQInverter(model, schedule, "ddim").invert(image)
    assert plain.stats.rounds == 50
    assert plain.stats.model_evals == 150
    assert not plain.converged.any(), "what is approximate does not claim to hold"
    inv = dq.DEQInverter(model, schedule).invert(image)
    assert (20 * inv.error <= plain.error).all()


def test_batches_are_independent(mixture, ddim, relative_error):
    model, schedule = mixture(), ddim(20)
    image = pictures(model, schedule, 3, torch.float64)
    spectrum = dq.SpectralSlope.fit(image)
    inverter = dq.DEQInverter(model, schedule, tol=1e-6, spectrum=spectrum)
    together = inverter.invert(image)
    alone = inverter.invert(image[1:2])
    assert relative_error(alone.noise, together.noise[1:2]).max() < 1e-12


@pytest.mark.parametrize("options", [{"window": 5}, {"max_batch": 7}, {"history": 0, "slope": None, "damping": 0.7},
                                     {"slope": None}, {"slope": "scalar", "history": 2}])  # fmt: skip
def test_settings_change_the_way_not_the_noise(mixture, ddim, relative_error, options):
    model, schedule = mixture(), ddim(20)
    image = pictures(model, schedule, 2, torch.float64)
    expected = dq.DEQInverter(model, schedule, tol=1e-7).invert(image)
    inv = dq.DEQInverter(model, schedule, tol=1e-7, **options).invert(image)
    assert inv.converged.all()
    assert relative_error(inv.noise, expected.noise).max() < 1e-4


def test_a_multistep_schedule(mixture):
    sigmas = [*torch.logspace(1, -1, 15, dtype=torch.float64).tolist(), 0.0]
    schedule = dq.Schedule.from_sigmas(sigmas, method="dpmpp_2m")
    assert schedule.lags > 1

    def model(x, sigma):  # the denoiser of Gaussian data with a mean, bent a little
        level = sigma.to(x.dtype)[:, None, None, None]
        return 0.3 + (x - 0.3) * 0.2 / (0.2 + level**2) + 0.05 * torch.tanh(x + level)

    image = 0.5 * torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for method in ("equilibrium", "fixed_point"):
        inv = dq.DEQInverter(model, schedule, method, tol=1e-5).invert(image)
        assert inv.converged.all(), method


def test_guidance(mixture, ddim):
    """Guidance 7.5 on a model with a condition: to the inverter just another model."""

    def conditional(x, t, label):
        """The model of Gaussian data, with a mean of its own for each class."""
        abar = ABAR[t].to(x.dtype)[:, None, None, None]
        mean = 0.3 * torch.cos(label.to(x.dtype)[:, None, None, None] * torch.arange(8))
        return (1 - abar).sqrt() * (x - abar.sqrt() * mean) / (0.2 * abar + 1 - abar) + 0.1 * torch.tanh(x - mean)

    def guided(x, t, label):
        free = conditional(x, t, 0 * label)
        return free + 7.5 * (conditional(x, t, label) - free)

    image, label = pictures(mixture(), ddim(20)), torch.tensor([1.0, 2.0])
    inv = dq.DEQInverter(guided, ddim(50)).invert(image, {"label": label})
    assert inv.error.max() <= 1e-3
    assert inv.converged.all()


def test_the_generator_is_left_for_the_sampler(mixture, ddim, relative_error):
    model, schedule = mixture(), ddim(20, 0.5)
    image = pictures(model, schedule, 2)
    generator = torch.Generator().manual_seed(7)
    inv = dq.DEQInverter(model, schedule).invert(image, generator=generator)
    out = dq.DEQSampler(model, schedule, tol=1e-5).sample(inv.noise, generator=generator)
    assert relative_error(out.sample, image).max() <= 2e-3
    with pytest.raises(ValueError, match="generator: this schedule adds noise"):
        dq.DEQInverter(model, schedule).invert(image)


def test_editing_starts_from_the_trajectory(mixture, ddim):
    model, schedule = mixture(), ddim(50)
    image = pictures(model, schedule, 1)
    inv = dq.DEQInverter(model, schedule).invert(image)
    sampler = dq.DEQSampler(model, schedule, window=50)
    warm, cold = sampler.sample(inv.noise, init_trajectory=inv.trajectory), sampler.sample(inv.noise)
    assert warm.stats.rounds < cold.stats.rounds
    again = dq.DEQInverter(model, schedule).invert(image, init_trajectory=inv.trajectory)
    assert again.converged.all()
    assert again.stats.rounds < inv.stats.rounds


def test_callbacks_see_it_and_stop_it(mixture, ddim):
    seen = []

    def record(info):
        seen.append((info.round, info.front.clone(), info.residual.clone()))
        assert info.noise().shape == (2, *SHAPE)
        return len(seen) == 3

    image = pictures(mixture(), ddim(20))
    inv = dq.DEQInverter(mixture(), ddim(20)).invert(image, callback=record, progress=True)
    assert [k for k, _, _ in seen] == [1, 2, 3]
    assert inv.stats.rounds == 3
    assert inv.stats.stop_reason == "callback"
    assert not inv.converged.any()


def test_evaluations_are_counted(mixture, ddim):
    model, image = mixture(), pictures(mixture(), ddim(20))
    inv = dq.DEQInverter(model, ddim(20)).invert(image)
    assert model.rows == inv.stats.model_evals + inv.stats.verify_evals
    assert inv.stats.verify_evals == 40
    assert inv.stats.residual_trace.shape == (inv.stats.rounds, 2)
    assert inv.stats.wall_seconds > 0
