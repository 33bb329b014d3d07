"""Schedulers that look misused and are not: the probe decides, not their counters and keys."""

from __future__ import annotations

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

import deqdiff_fast as dq  # noqa: E402
from deqdiff_fast import Schedule  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = 10
CUSTOM = [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]


def model(x, t):
    return torch.tanh(0.7 * x + 0.2 * x.roll(1, 3))


def loop(scheduler, x, **step_kwargs):
    """diffusers' own, on a scheduler whose timesteps are set."""
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(model(scaled, t), t, x, **step_kwargs).prev_sample
    return x


def check(scheduler, relative_error, **step_kwargs):
    """from_diffusers(scheduler) against a loop of the scheduler, whose timesteps are set."""
    schedule = Schedule.from_diffusers(scheduler)
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * getattr(
        scheduler, "init_noise_sigma", 1.0
    )
    draws = [torch.Generator().manual_seed(1) for _ in range(2)]
    ours = dq.DEQSampler(model, schedule, solver="quasi-newton", tol=1e-5).sample(noise, generator=draws[0]).sample
    if "generator" in step_kwargs:
        step_kwargs["generator"] = draws[1]
    reference = loop(scheduler, noise, **step_kwargs)
    assert reference.isfinite().all()
    assert relative_error(ours, reference).max() < 1e-3


@pytest.mark.parametrize("rule", ["DDPMScheduler", "DDPMParallelScheduler"])
def test_ddpm_with_custom_timesteps(relative_error, rule):
    scheduler = getattr(diffusers, rule)(clip_sample=False)
    with pytest.raises(ValueError, match="fresh scheduler"):
        Schedule.from_diffusers(scheduler)
    scheduler.set_timesteps(timesteps=CUSTOM)
    assert scheduler.num_inference_steps is None
    assert Schedule.from_diffusers(scheduler).timesteps.tolist() == CUSTOM
    assert Schedule.from_diffusers(scheduler, timesteps=CUSTOM).timesteps.tolist() == CUSTOM
    check(scheduler, relative_error, generator=None)


ZERO_SNR = [
    ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    ("EulerDiscreteScheduler", {"timestep_spacing": "leading"}),
    ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing"}),
    ("DPMSolverMultistepScheduler", {"timestep_spacing": "trailing"}),
    ("UniPCMultistepScheduler", {"timestep_spacing": "trailing"}),
    ("DDIMScheduler", {"timestep_spacing": "leading", "clip_sample": False}),
    ("DDPMScheduler", {"timestep_spacing": "leading", "clip_sample": False}),
]


@pytest.mark.parametrize(("rule", "options"), ZERO_SNR)
def test_a_terminal_signal_of_zero_where_the_steps_are_finite(relative_error, rule, options):
    scheduler = getattr(diffusers, rule)(rescale_betas_zero_snr=True, **options)
    scheduler.set_timesteps(STEPS)
    check(scheduler, relative_error, **({"generator": None} if "Ancestral" in rule or "DDPM" in rule else {}))


def test_a_scheduler_whose_counters_stand_at_its_first_step(relative_error):
    """`scale_noise` and `set_begin_index` of image-to-image pipelines set counters without a step."""
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(STEPS)
    noise = torch.randn(1, 3, 8, 8)
    scheduler.set_begin_index(0)
    scheduler.scale_noise(noise, scheduler.timesteps[:1], noise)
    assert scheduler.step_index == 0
    check(scheduler, relative_error)
    with pytest.raises(ValueError, match="middle of a chain"):
        Schedule.from_diffusers(scheduler)


@pytest.mark.parametrize(
    "rule", ["DPMSolverMultistepScheduler", "PNDMScheduler", "HeunDiscreteScheduler", "IPNDMScheduler"]
)
def test_one_that_has_made_a_step_is_refused(rule):
    scheduler = getattr(diffusers, rule)()
    scheduler.set_timesteps(STEPS)
    x = torch.randn(1, 3, 8, 8)
    scheduler.step(model(scheduler.scale_model_input(x, scheduler.timesteps[0]), 0), scheduler.timesteps[0], x)
    with pytest.raises(ValueError, match="middle of a chain"):
        Schedule.from_diffusers(scheduler)


def test_a_step_that_was_replaced_on_the_object():
    scheduler = diffusers.EulerDiscreteScheduler()
    plain = scheduler.step
    scheduler.step = lambda *args, **kwargs: plain(*args, **kwargs)
    with pytest.raises(ValueError, match="its step was replaced"):
        Schedule.from_diffusers(scheduler, STEPS)
