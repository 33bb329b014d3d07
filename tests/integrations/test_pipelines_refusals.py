"""What a call is refused for: before which work, and whether the sentence names what is to be changed."""

from __future__ import annotations

import pytest
import torch

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import deqdiff_fast as dq  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
diffusers.utils.logging.set_verbosity_error()
DPM, DDIM, DDPM = "DPMSolverMultistepScheduler", "DDIMScheduler", "DDPMScheduler"
ZERO = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
NOT_AFFINE, REFUSED = dq.NotAffineError, dq.DeqDiffError


def nothing(pipe, monkeypatch):
    pass


def wrapped_step(pipe, monkeypatch):
    plain = pipe.scheduler.step
    pipe.scheduler.step = lambda *args, **kwargs: plain(*args, **kwargs)


def counting_hook(pipe, monkeypatch):
    calls = []
    pipe.unet.conv_in.register_forward_hook(lambda *_: calls.append(1))


def two_faced_class(pipe, monkeypatch):
    class Averaging(type(pipe.unet)):
        def forward(self, sample, timestep, *args, **kwargs):
            return super().forward(sample, torch.as_tensor(timestep).flatten()[0], *args, **kwargs)

    pipe.unet.__class__ = Averaging


def other_guidance(pipe, monkeypatch):
    from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion as module

    monkeypatch.setattr(module, "rescale_noise_cfg", lambda cfg, text, guidance_rescale: cfg.abs())


def cached(pipe, monkeypatch):
    if not hasattr(diffusers, "FirstBlockCacheConfig"):
        pytest.skip("of diffusers from 0.34 on")
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))


def other_scheduler(pipe, monkeypatch):
    vars(pipe)["scheduler"] = object()


# which of the work is done by then: nothing, the encoders', a call of the network for each of its rows
NOTHING, TEXTS, FIRST_STEP = 0, 1, 2
CASES = [
    ("sd", DPM, {"thresholding": True}, nothing, {}, NOTHING, NOT_AFFINE, "config.thresholding"),
    ("sd", DDPM, {"variance_type": "learned_range"}, nothing, {}, NOTHING, NOT_AFFINE, "config.variance_type"),
    ("sd", "UnCLIPScheduler", {}, nothing, {}, NOTHING, NOT_AFFINE, "UnCLIPScheduler"),
    ("cogvideox", "CogVideoXDPMScheduler", {}, nothing, {}, NOTHING, NOT_AFFINE, "use CogVideoXDDIMScheduler"),
    ("sd-controlnet", DDIM, {}, nothing, {"guess_mode": True}, NOTHING, REFUSED, "guess_mode=True"),
    ("sd", DDIM, {}, wrapped_step, {}, NOTHING, REFUSED, "scheduler.step was replaced"),
    ("sd", DDIM, {}, other_scheduler, {}, NOTHING, TypeError, "scheduler"),
    ("flux", None, {}, cached, {}, NOTHING, REFUSED, r"enable_cache\(FirstBlockCacheConfig\)"),
    ("sd", DDIM, {}, nothing, {"nonsense": 1}, NOTHING, ValueError, "nonsense: StableDiffusionPipeline has no such"),
    ("sd", DDIM, ZERO, nothing, {}, TEXTS, NOT_AFFINE, "config.rescale_betas_zero_snr"),
    ("sd-img2img", DDIM, ZERO, nothing, {"strength": 1.0}, TEXTS, NOT_AFFINE, "config.rescale_betas_zero_snr"),
    ("sd", DDIM, {}, counting_hook, {}, FIRST_STEP, REFUSED, "a forward hook at conv_in"),
    ("sd", DDIM, {}, two_faced_class, {}, FIRST_STEP, REFUSED, "the class Averaging"),
    ("sd", DDIM, {}, other_guidance, {"guidance_rescale": 0.5}, FIRST_STEP, REFUSED, "reason: .*guidance_rescale"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "rule", "config", "prepare", "changes", "work", "kind", "words"), CASES)
def test_what_is_refused_comes_before_work_and_is_named(
    make, tiny, monkeypatch, name, rule, config, prepare, changes, work, kind, words
):
    if rule == "UnCLIPScheduler":
        pipe = make(name)
        pipe.scheduler = diffusers.UnCLIPScheduler(variance_type="learned_range")
    else:
        pipe = make(name, rule, **config)
    done = []

    def watch(owner, key, stage):
        plain = getattr(owner, key)

        def own(*args, **kwargs):
            done.append(stage)
            return plain(*args, **kwargs)

        monkeypatch.setattr(owner, key, own)

    prepare(pipe, monkeypatch)
    network = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    watch(type(pipe), "encode_prompt", TEXTS)
    watch(type(network), "__call__", FIRST_STEP)
    handed = []
    changes = changes | {"callback_on_step_end": lambda *args: handed.append(args) or {}}
    given = tiny.arguments(name, **changes)
    with pytest.raises(kind, match=words):
        tiny.call(dq.integrations.diffusers.parallelize(pipe, on_failure="raise"), **given)
    assert max(done, default=NOTHING) <= work
    assert not handed
    assert network is (vars(pipe).get("unet") or pipe.transformer)


class Denoiser(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.calls = torch.nn.Linear(8, 8), 0

    def forward(self, x, when, label=None):
        self.calls += 1
        return torch.tanh(self.layer(x))


def other_times(model, x, t, scheduler):
    return model(x, 0.37 * t)


def other_rows(model, x, t, scheduler):
    return model(x, t, label=torch.zeros(5, 4))


def no_time(model, x, t, scheduler):
    return model(x)


def many_arguments(model, x, t, scheduler):
    return model(x, t, None, 1, 2)


def scaled_twice(model, x, t, scheduler):
    scheduler.scale_model_input(x, t)
    return model(scheduler.scale_model_input(2 * x, t), t)


def other_input(model, x, t, scheduler):
    return model(2 * x, t)


def bent(model, x, t, scheduler):
    return model(x, t).tanh()


LOOPS = [
    (other_times, 0, "passes timesteps to its model"),
    (other_rows, 0, "label: expected tensors with one row for each of the 3 rows"),
    (no_time, 0, "calls its model without when"),
    (many_arguments, 0, "calls its model with 5 arguments by position"),
    (scaled_twice, 0, "scales its model's input"),
    (other_input, 1, "prepares its model's input"),
    (bent, 1, "combines its model's outputs"),
]


@pytest.mark.parametrize(("step", "calls", "words"), LOOPS)
def test_what_an_own_loop_does_is_named_before_a_step_is_handed_out(step, calls, words):
    scheduler, model = diffusers.DDIMScheduler(clip_sample=False), Denoiser()
    scheduler.set_timesteps(6)
    x, handed = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)), []

    def run(x):
        with dq.integrations.diffusers.parallel_loop(scheduler, model):
            for t in scheduler.timesteps:
                x = scheduler.step(step(model, x, t, scheduler), t, x).prev_sample
                handed.append(t)

    with pytest.raises((dq.DeqDiffError, ValueError), match=words) as refusal:
        run(x)
    assert not handed
    assert model.calls == calls
    if isinstance(refusal.value, dq.DeqDiffError):
        assert "the loop over DDIMScheduler" in str(refusal.value)
        assert "without parallel_loop it runs as it is" in str(refusal.value)
    assert type(model) is Denoiser
