"""Denoisers and schedulers with parts of a user's own: parallel where their rows are independent, else as they are."""

from __future__ import annotations

import functools
import types

import pytest
import torch

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from diffusers.models.attention_processor import AttnProcessor2_0  # noqa: E402

import deqdiff_fast as dq  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
diffusers.utils.logging.set_verbosity_error()
DPM, EULER, DDIM = "DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "DDIMScheduler"


def parallel(pipe, **options):
    return dq.integrations.diffusers.parallelize(pipe, **({"solver": "quasi-newton", "tol": 1e-5} | options))


class Processor(AttnProcessor2_0):
    """A user's own; `how` says what is wrong with it."""

    def __init__(self, how):
        super().__init__()
        self.how, self.calls = how, 0

    def __call__(self, attn, hidden_states, *args, **kwargs):
        if self.how == "counts":
            self.calls += 1
        out = super().__call__(attn, hidden_states, *args, **kwargs)
        if self.how == "shares":
            return 0.5 * out + 1.5 * out.roll(1, 0)
        return out * (1 + 0.2 * (self.calls // 2 % 3)) if self.how == "counts" else out * 1.5


def counting_processor(pipe):
    pipe.unet.set_attn_processor(Processor("counts"))


def sharing_processor(pipe):
    pipe.unet.set_attn_processor(Processor("shares"))


def counting_hook(pipe):
    calls = []

    def hook(module, args, output):
        calls.append(1)
        return output * (1 + 0.3 * (len(calls) % 4))

    pipe.unet.conv_in.register_forward_hook(hook)


def counting_pre_hook(pipe):
    pipe.unet.calls = 0

    def hook(module, args):
        module.calls += 1

    pipe.unet.register_forward_pre_hook(hook)


def counting_hook_with_nonlocal(pipe):
    count = 0

    def hook(module, args, output):
        nonlocal count
        count += 1
        return output * (1 + 0.3 * (count % 4))

    pipe.unet.conv_in.register_forward_hook(hook)


def window_on_the_first_timestep(pipe):
    plain = pipe.unet.forward

    def forward(sample, timestep, *args, **kwargs):
        late = float(torch.as_tensor(timestep).flatten()[0]) < 500
        out = plain(sample, timestep, *args, **kwargs)
        return (out[0] * 0.5,) if late else out

    pipe.unet.forward = forward


def index_of_the_timestep(pipe):  # horseee/DeepCache
    plain = pipe.unet.forward

    @functools.wraps(plain)
    def forward(*args, **kwargs):
        pipe.step = list(pipe.scheduler.timesteps).index(args[1].item())
        return plain(*args, **kwargs)

    pipe.unet.forward = forward


def cached_block(pipe):
    block, kept = pipe.unet.mid_block, {}
    plain = block.forward

    def forward(self, hidden_states, *args, **kwargs):
        kept["calls"] = kept.get("calls", 0) + 1
        if kept["calls"] % 3 == 1:
            kept["out"] = plain(hidden_states, *args, **kwargs)
        return kept["out"]

    block.forward = types.MethodType(forward, block)


class OwnClass(diffusers.UNet2DConditionModel):
    def forward(self, sample, timestep, *args, **kwargs):
        sample = sample * (1.0 if torch.as_tensor(timestep).flatten()[0] > 400 else 0.5)
        return super().forward(sample, timestep, *args, **kwargs)


def own_class(pipe):
    pipe.unet.__class__ = OwnClass


def patched_class(pipe):
    pipe.unet.conv_out.__class__ = type("Conv2d", (torch.nn.Conv2d,), {"forward": _mixing_forward})


def _mixing_forward(self, x):
    return torch.nn.functional.conv2d(x + 0.3 * x.mean(0, keepdim=True), self.weight, self.bias, padding=1)


SERIAL = [
    counting_processor, sharing_processor, counting_hook, counting_pre_hook, counting_hook_with_nonlocal,
    window_on_the_first_timestep, index_of_the_timestep, cached_block, own_class, patched_class,
]  # fmt: skip


@pytest.mark.parametrize("install", SERIAL, ids=lambda f: f.__name__)
def test_what_is_no_function_of_its_rows_is_left_to_the_pipelines_loop(make, tiny, relative_error, caplog, install):
    reference_pipe, pipe = make("sd", DPM), make("sd", DPM)
    for each in (reference_pipe, pipe):
        install(each)
    reference = tiny.call(reference_pipe, **tiny.arguments("sd"))[0]
    ours = tiny.call(parallel(pipe), **tiny.arguments("sd"))[0]
    assert torch.equal(ours, reference)  # not one call more or less
    solution = pipe.last_solution
    assert solution.converged.all()
    assert solution.stats.finished_serially == tiny.STEPS
    assert solution.stats.stop_reason == "serial"
    assert torch.equal(solution.sample, ours)
    assert "cannot be solved in parallel" in caplog.text
    strict, used = parallel(make("sd", DPM), on_failure="raise"), []
    install(strict)
    strict.unet.conv_in.register_forward_pre_hook(lambda *_: used.append(1))
    with pytest.raises(dq.DeqDiffError, match="cannot be solved in parallel"):
        tiny.call(strict, **tiny.arguments("sd"))


def pure_processor(pipe):
    pipe.unet.set_attn_processor(Processor("pure"))


def pure_hook(pipe):
    pipe.unet.mid_block.register_forward_hook(lambda module, args, output: output * 1.5)


def pure_wrapper(pipe):
    plain = pipe.unet.forward
    pipe.unet.forward = lambda *args, **kwargs: plain(*args, **kwargs)


def casting(pipe):
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)


def offloading(pipe):
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(pipe.unet, hooks.AlignDevicesHook("cpu"))


def free_u(pipe):
    pipe.enable_freeu(s1=0.9, s2=0.8, b1=1.2, b2=1.3)


@pytest.mark.parametrize("install", [pure_processor, pure_hook, pure_wrapper, casting, offloading, free_u])
def test_what_is_one_stays_parallel(make, tiny, relative_error, install):
    if install is casting and not hasattr(diffusers.UNet2DConditionModel, "enable_layerwise_casting"):
        pytest.skip("this diffusers has no layerwise casting")
    reference_pipe, pipe = make("sd", EULER), make("sd", EULER)
    for each in (reference_pipe, pipe):
        install(each)
    reference = tiny.call(reference_pipe, **tiny.arguments("sd"))[0]
    ours = tiny.call(parallel(pipe), **tiny.arguments("sd"))[0]
    assert relative_error(ours, reference).max() < 1e-3
    assert pipe.last_solution.stats.finished_serially == 0


CACHES = ("MagCacheConfig", "FirstBlockCacheConfig", "PyramidAttentionBroadcastConfig", "TaylorSeerCacheConfig")


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("later", [False, True])
def test_caches_of_diffusers(make, tiny, relative_error, name, later):
    kind = getattr(diffusers, name, None)
    if kind is None:
        pytest.skip(f"this diffusers has no {name}")
    options = {
        "MagCacheConfig": {"num_inference_steps": tiny.STEPS, "mag_ratios": [1.0] * tiny.STEPS},
        "FirstBlockCacheConfig": {"threshold": 0.2},
    }.get(name, {})

    def fresh():
        pipe = make("flux")
        torch.manual_seed(1)
        pipe.transformer = diffusers.FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=8,
            num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=16, guidance_embeds=True,
            axes_dims_rope=(2, 4, 2),
        ).eval()  # fmt: skip
        return pipe

    def enable(pipe):
        if "Pyramid" in name:
            now = lambda: 400  # noqa: E731
            pipe.transformer.enable_cache(kind(spatial_attention_block_skip_range=2, current_timestep_callback=now))
        else:
            pipe.transformer.enable_cache(kind(**options))

    def callback(pipe, index, timestep, tensors):
        if later and index == 2:
            enable(pipe)
        return {}

    given = tiny.arguments("flux", true_cfg_scale=1.0, callback_on_step_end=callback)
    results = []
    for pipe in (fresh(), parallel(fresh())):
        if not later:
            enable(pipe)
        results.append(tiny.call(pipe, **given)[0])
    assert relative_error(results[1], results[0]).max() < 1e-4
    assert pipe.last_solution.stats.finished_serially > 0
    if not later:
        strict = parallel(fresh(), on_failure="raise")
        enable(strict)
        with pytest.raises(dq.DeqDiffError, match=name.removesuffix("Config")):
            tiny.call(strict, **given)


@pytest.mark.parametrize("rule", [DDIM, EULER, DPM])
def test_a_wrapper_of_the_schedulers_step_sees_every_step(make, tiny, rule):
    def recorded(pipe):
        plain, log = pipe.scheduler.step, []

        def step(model_output, timestep, sample, *args, **kwargs):
            log.append((model_output.clone(), float(timestep), sample.clone()))
            return plain(model_output, timestep, sample, *args, **kwargs)

        pipe.scheduler.step = step
        return log

    pipes = make("sd", rule), parallel(make("sd", rule))
    logs = [recorded(pipe) for pipe in pipes]
    expected, found = (tiny.call(pipe, **tiny.arguments("sd"))[0] for pipe in pipes)
    assert torch.equal(found, expected)
    for (output, t, sample), (output_too, t_too, sample_too) in zip(*logs, strict=True):
        assert t == t_too
        assert torch.equal(output, output_too)
        assert torch.equal(sample, sample_too)
    with pytest.raises(ValueError, match="step"):
        dq.Schedule.from_diffusers(pipes[1].scheduler, 5)


def test_inversion_refuses_what_keeps_state(make, tiny):
    pipe = make("sd")
    counting_hook(pipe)
    with pytest.raises(dq.DeqDiffError, match="keeps something"):
        dq.integrations.diffusers.invert(pipe, torch.zeros(1, 4, 8, 8), "a cat", num_inference_steps=4)
