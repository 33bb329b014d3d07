"""What Schedule.from_diffusers must refuse, and what it must leave alone."""

from __future__ import annotations

import copy
import threading

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from deqdiff_fast.errors import NotAffineError  # noqa: E402
from deqdiff_fast.schedule import Schedule  # noqa: E402

diffusers.utils.logging.set_verbosity_error()
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "PNDMScheduler"])
def test_the_users_scheduler_is_not_changed(name):
    scheduler = getattr(diffusers, name)()
    scheduler.set_timesteps(7)
    before = copy.deepcopy(vars(scheduler))
    Schedule.from_diffusers(scheduler, 12)
    after = vars(scheduler)
    assert before.keys() == after.keys()
    for key, value in before.items():
        same = torch.equal(value, after[key]) if isinstance(value, torch.Tensor) else str(value) == str(after[key])
        assert same, key


def test_timesteps_that_are_already_set_are_used_and_a_used_scheduler_is_refused():
    scheduler = diffusers.EulerDiscreteScheduler()
    with pytest.raises(ValueError, match="num_inference_steps"):
        Schedule.from_diffusers(scheduler)
    scheduler.set_timesteps(sigmas=[10.0, 3.0, 1.0, 0.3, 0.0])
    schedule = Schedule.from_diffusers(scheduler)
    assert schedule.num_steps == 4
    torch.testing.assert_close(schedule.sigma, torch.tensor([10.0, 3.0, 1.0, 0.3, 0.0], dtype=torch.float64))
    x = torch.ones(2, 3, 4, 4)
    scheduler.step(scheduler.scale_model_input(x, scheduler.timesteps[0]), scheduler.timesteps[0], x)
    with pytest.raises(ValueError, match="middle of a chain"):
        Schedule.from_diffusers(scheduler)
    for bad in (0, -1, 2.5):
        with pytest.raises(ValueError, match="num_inference_steps"):
            Schedule.from_diffusers(scheduler, bad)
    with pytest.raises(TypeError, match="etta"):
        Schedule.from_diffusers(scheduler, 5, etta=1.0)
    with pytest.raises(TypeError, match="diffusers scheduler"):
        Schedule.from_diffusers(object(), 5)


REFUSED_CONFIGS = [
    ("DDIMScheduler", {"thresholding": True}, "thresholding=False"),
    ("DPMSolverMultistepScheduler", {"thresholding": True}, "thresholding=False"),
    ("DDPMScheduler", {"variance_type": "learned_range"}, "variance_type"),
    ("DDIMScheduler", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, "rescale_betas_zero_snr=False"),
    ("UniPCMultistepScheduler", {"solver_type": "bh1"}, "non-finite"),  # its own bh1 divides by infinity at sigma 0
    ("KDPM2DiscreteScheduler", {"prediction_type": "sample"}, "NotImplementedError"),
]


@pytest.mark.parametrize(("name", "options", "reason"), REFUSED_CONFIGS)
def test_configurations_that_cannot_be_exact_are_refused_by_name(name, options, reason):
    scheduler = getattr(diffusers, name)(**options)
    with pytest.raises(NotAffineError, match=reason) as refusal:
        Schedule.from_diffusers(scheduler, 10)
    assert name in str(refusal.value)


def _altered(change):
    class Altered(diffusers.DDIMScheduler):
        def step(self, model_output, timestep, sample, return_dict=True):
            history = self.__dict__.setdefault("history", [])
            history.append(model_output)
            plain = super().step(model_output, timestep, sample, return_dict=False)[0]
            return (change(plain, sample, model_output, history),)

    return Altered(clip_sample=False)


FAULTS = {
    "saturation far outside the data": lambda x, s, o, h: x.clamp(-2000, 2000),
    "saturation": lambda x, s, o, h: torch.tanh(x),
    "a constant": lambda x, s, o, h: x + 1e-3,
    "scaling by the sample's own norm": lambda x, s, o, h: x / (1 + 1e-6 * s.square().mean((1, 2, 3), keepdim=True)),
    "mixing of pixels": lambda x, s, o, h: x + 1e-4 * x.roll(1, 3),
    "a product": lambda x, s, o, h: x + 1e-6 * s * o,
    "an output of twenty steps ago": lambda x, s, o, h: x + 1e-3 * h[max(0, len(h) - 21)],
    "uniform noise": lambda x, s, o, h: x + 1e-3 * torch.rand(x.shape),
    "noise of another distribution": lambda x, s, o, h: x + 1e-3 * torch.randn(x.shape).square(),
    "two noises": lambda x, s, o, h: x + torch.randn(x.shape) - torch.randn(x.shape),
    "hidden randomness": lambda x, s, o, h: x + 1e-3 * torch.empty(x.shape).uniform_(),
    "NaN": lambda x, s, o, h: x * float("nan"),
    "another shape": lambda x, s, o, h: x[:1],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_step_that_is_not_affine_is_noticed(fault):
    with pytest.raises(NotAffineError):
        Schedule.from_diffusers(_altered(FAULTS[fault]), 40)


def test_a_step_that_is_affine_is_accepted_with_its_quirks():
    quirk = _altered(lambda x, s, o, h: 1.01 * x + (0.3 * h[-4] if len(h) > 3 else 0.0) + 1e-3 * h[0])
    schedule = Schedule.from_diffusers(quirk, 12)
    assert 4 <= schedule.lags <= 6
    quirk.set_timesteps(12)
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    states, outputs = [x], []
    for i, t in enumerate(quirk.timesteps):
        outputs.append(torch.tanh(x.roll(1, 3) - t / 500))
        x = quirk.step(outputs[i], t, x)[0]
        ours = torch.zeros_like(x)
        for lag in range(min(schedule.lags, i + 1)):
            ours += schedule.state_coef[i, lag] * states[i - lag] + schedule.model_coef[i, lag] * outputs[i - lag]
        torch.testing.assert_close(ours, x, rtol=1e-9, atol=1e-9)
        states.append(x)


def test_clipping_that_the_estimate_does_not_explain_is_refused():
    class Squashing(diffusers.DDIMScheduler):
        def step(self, model_output, timestep, sample, return_dict=True):
            out = super().step(model_output, timestep, sample)
            if self.config.clip_sample:
                out.prev_sample = out.prev_sample.clamp(-1, 1)
            return out

    with pytest.raises(NotAffineError, match="clip_sample=False"):
        Schedule.from_diffusers(Squashing(), 10)
    Schedule.from_diffusers(Squashing(clip_sample=False), 10)


def test_noise_of_other_threads_is_left_alone():
    stop, bad = threading.Event(), []

    def sample_meanwhile():
        while not stop.is_set():
            x = torch.randn(2, 3, 4, 8, dtype=torch.float64)
            if x.to(torch.float32).dtype != torch.float32 or x.eq(last[0]).any():
                bad.append(x)
            last[0] = x

    last = [torch.zeros(2, 3, 4, 8, dtype=torch.float64)]
    thread = threading.Thread(target=sample_meanwhile)
    thread.start()
    try:
        Schedule.from_diffusers(diffusers.EulerAncestralDiscreteScheduler(), 50)
    finally:
        stop.set()
        thread.join()
    assert not bad


def test_the_global_generator_is_left_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    Schedule.from_diffusers(diffusers.DDPMScheduler(), 10)
    assert torch.equal(before, torch.get_rng_state())
