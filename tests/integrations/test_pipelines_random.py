"""Random calls of random pipelines: the untouched pipeline's picture, or refused by name before a network is called."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

import deqdiff_fast as dq  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
diffusers.utils.logging.set_verbosity_error()
EXAMPLES = int(os.environ.get("DEQDIFF_RANDOM_PIPELINE_CALLS", "10"))
DISCRETE = {
    "DDIMScheduler": [{}, {"clip_sample": True}, {"prediction_type": "v_prediction"}, {"timestep_spacing": "trailing"}],
    "DDPMScheduler": [{}, {"clip_sample": True}, {"variance_type": "learned_range"}],
    "DPMSolverMultistepScheduler": [
        {}, {"algorithm_type": "sde-dpmsolver++"}, {"solver_order": 3}, {"use_karras_sigmas": True},
        {"thresholding": True}, {"solver_type": "heun"}, {"euler_at_final": True},
    ],
    "DPMSolverSinglestepScheduler": [{}, {"solver_order": 3}],
    "DEISMultistepScheduler": [{}],
    "UniPCMultistepScheduler": [{}, {"solver_order": 3}, {"solver_type": "bh1"}],
    "EulerDiscreteScheduler": [{}, {"use_karras_sigmas": True}, {"timestep_spacing": "trailing"}],
    "EulerAncestralDiscreteScheduler": [{}],
    "HeunDiscreteScheduler": [{}],
    "LMSDiscreteScheduler": [{}],
    "KDPM2DiscreteScheduler": [{}],
    "KDPM2AncestralDiscreteScheduler": [{}],
    "PNDMScheduler": [{"skip_prk_steps": True}, {}],
    "LCMScheduler": [{}, {"clip_sample": True}],
    "TCDScheduler": [{}],
    "SASolverScheduler": [{}],
}  # fmt: skip
FLOWS = {
    "FlowMatchEulerDiscreteScheduler": [{}, {"stochastic_sampling": True}, {"use_karras_sigmas": True}],
    "FlowMatchHeunDiscreteScheduler": [{}],
    "UniPCMultistepScheduler": [{"prediction_type": "flow_prediction", "use_flow_sigmas": True}],
    "DPMSolverMultistepScheduler": [{"prediction_type": "flow_prediction", "use_flow_sigmas": True}],
}
DENOISERS = ("unet", "transformer", "controlnet")
GUIDED = {"guidance_scale": [1.0, 1.7, 6.0]}
UNET = GUIDED | {"eta": [0.0, 0.5], "guidance_rescale": [0.0, 0.6]}
OPTIONS = {
    "ddim": (DISCRETE, {"eta": [0.0, 0.7]}),
    "ddpm": (DISCRETE, {}),
    "dit": (DISCRETE, GUIDED),
    "sd": (DISCRETE, UNET | {"num_images_per_prompt": [1, 2], "generator": [0, 4]}),
    "sd-img2img": (DISCRETE, GUIDED | {"strength": [0.3, 0.8, 1.0]}),
    "sdxl": (DISCRETE, UNET | {"denoising_end": [None, 0.6]}),
    "sdxl-img2img": (DISCRETE, GUIDED | {"denoising_start": [None, 0.4]}),
    "sd3": (FLOWS, GUIDED | {"num_images_per_prompt": [1, 2]}),
    "flux": (FLOWS, {"true_cfg_scale": [1.0, 2.5]}),
    "sd-inpaint": (DISCRETE, GUIDED | {"strength": [0.6, 1.0], "eta": [0.0, 0.5]}),
    "sd-inpaint-plain": (DISCRETE, GUIDED | {"strength": [0.6, 1.0], "eta": [0.0, 0.5]}),
    "sd-controlnet": (
        DISCRETE,
        GUIDED | {"control_guidance_end": [1.0, 0.5], "controlnet_conditioning_scale": [1.0, 0.3],
                  "guess_mode": [False, True]},
    ),
    "sd-ip-adapter": (DISCRETE, {"eta": [0.0, 0.5]}),
    "sd-perturbed": (DISCRETE, GUIDED | {"pag_scale": [0.0, 2.0], "pag_adaptive_scale": [0.0, 0.3]}),
    "animatediff": (DISCRETE, GUIDED),
    "marigold": ({"DDIMScheduler": [{}], "LCMScheduler": [{}]}, {"batch_size": [1, 2], "ensemble_size": [1, 3]}),
    "lumina2": (FLOWS, GUIDED | {"cfg_trunc_ratio": [1.0, 0.4], "cfg_normalization": [True, False]}),
    "ltx": (FLOWS, GUIDED | {"guidance_rescale": [0.0, 0.5]}),
    "wan": (FLOWS, GUIDED),
    "wan2.2": (FLOWS, GUIDED | {"guidance_scale_2": [1.0, 3.0]}),
    "cogvideox": ({"CogVideoXDDIMScheduler": [{}], "CogVideoXDPMScheduler": [{}]}, {"use_dynamic_cfg": [False, True]}),
    "sd3-skipped-layers": (FLOWS, {"skip_layer_guidance_start": [0.0, 0.3], "skip_layer_guidance_stop": [0.4, 1.0]}),
    "pixart-sigma": (DISCRETE, GUIDED),
    "mochi": (FLOWS, GUIDED),
}  # fmt: skip


def watching(pipe, index, timestep, tensors):
    return {}


def changing(pipe, index, timestep, tensors):
    return {"latents": tensors["latents"] * 0.8} if index == 1 else {}


def strengthening(pipe, index, timestep, tensors):
    if index == 1 and hasattr(pipe, "_guidance_scale"):
        pipe._guidance_scale *= 1.2
    return {}


def writing(pipe, index, timestep, tensors):
    """A picture of zeros over a part of the latents, as noisy as they are, for four steps."""
    rule, latents = pipe.scheduler, tensors["latents"].clone()
    if index < 4 and index + 1 < len(rule.timesteps):
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(8), dtype=latents.dtype)
        given = (rule.timesteps[index + 1 : index + 2], noise)
        add, given = (rule.scale_noise, given) if hasattr(rule, "scale_noise") else (rule.add_noise, given[::-1])
        latents[..., :3] = add(torch.zeros_like(latents), *given)[..., :3]
    return {"latents": latents}


def stopping(pipe, index, timestep, tensors):
    pipe._interrupt = index >= 2
    return {}


@st.composite
def calls(draw) -> tuple:
    name = draw(st.sampled_from(sorted(OPTIONS)))
    rules, options = OPTIONS[name]
    rule = draw(st.sampled_from(sorted(rules)))
    config = draw(st.sampled_from(rules[rule]))
    changes = {key: draw(st.sampled_from(values)) for key, values in options.items()}
    changes["num_inference_steps"] = draw(st.integers(2, 9))
    callback = draw(st.sampled_from([None, None, watching, changing, strengthening, writing, stopping]))
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.float64]))
    return name, rule, config, changes, callback, dtype


def result(tiny, pipe, name: str, changes: dict, callback, dtype: torch.dtype) -> torch.Tensor:
    pipe = pipe.to(dtype)
    given = tiny.arguments(name, **changes)
    own = given.pop("generator", 0)
    given = {
        key: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for key, value in given.items()
    }
    if callback is not None and name not in ("ddim", "ddpm", "dit", "marigold", "pixart-sigma"):
        given["callback_on_step_end"] = callback
    out = tiny.call(pipe, generator=own, **given)[0]
    return torch.as_tensor(out, dtype=torch.float64)


@contextmanager
def denoiser_calls(pipe) -> Iterator[list[str]]:
    """The names of the denoising networks that are called meanwhile, one for each call."""
    names = {id(part): name for name, part in pipe.components.items() if name.startswith(DENOISERS)}
    found: list[str] = []

    def note(module, args) -> None:
        if id(module) in names:
            found.append(names[id(module)])

    hook = torch.nn.modules.module.register_module_forward_pre_hook(note)
    try:
        yield found
    finally:
        hook.remove()


def check(tiny, relative_error, folder: Path, call: tuple) -> str:
    """What became of a call; raises AssertionError."""
    name, rule, config, changes, callback, dtype = call
    try:
        plain = tiny.build(name, folder, rule, **config)
        reference = result(tiny, plain, name, changes, callback, dtype)
    except Exception:
        return "the plain pipeline does not take it"
    if not reference.isfinite().all():
        return "the plain pipeline overflows"
    handed: list[int] = []

    def counted(pipe, index, timestep, tensors):
        handed.append(index)
        return callback(pipe, index, timestep, tensors)

    pipe = dq.integrations.diffusers.parallelize(
        tiny.build(name, folder, rule, **config), tol=1e-4, solver="quasi-newton"
    )
    with denoiser_calls(pipe) as called:
        try:
            ours = result(tiny, pipe, name, changes, callback and counted, dtype)
        except (dq.NotAffineError, dq.DeqDiffError, ValueError) as error:
            options = config or [type(pipe.scheduler).__name__]
            if handed or called or not any(option in str(error) for option in options):
                sentence = f"{call}: refused after {len(handed)} steps and {len(called)} calls: {error}"
                raise AssertionError(sentence) from error
            return "refused"
    assert called, call
    assert ours.shape == reference.shape
    assert relative_error(ours, reference).max() < 1e-3, f"{call} {pipe.last_recording}"
    return "serial" if pipe.last_solution.stats.finished_serially else "parallel"


@settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)
@given(call=calls())
def test_right_or_refused(tiny, relative_error, tmp_path_factory, call):
    check(tiny, relative_error, Path(tmp_path_factory.mktemp("pipe")), call)
