"""What a pipeline's loop does around its model is done as it does it: scaling, draws, the convention of its calls."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import deqdiff_fast as dq  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
diffusers.utils.logging.set_verbosity_error()
DPM, EULER, FLOW = "DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"
ANCESTRAL, HEUN, DDPM = "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "DDPMScheduler"


def parallel(pipe, **options):
    return dq.integrations.diffusers.parallelize(pipe, **({"solver": "quasi-newton", "tol": 1e-5} | options))


LOOPS = [("ddpm", rule) for rule in (EULER, ANCESTRAL, DPM, "KDPM2AncestralDiscreteScheduler")]
LOOPS += [("dit", rule) for rule in (EULER, DPM, HEUN, "LMSDiscreteScheduler", "KDPM2DiscreteScheduler", ANCESTRAL)]


@pytest.mark.parametrize(("name", "rule"), LOOPS)
def test_loops_that_do_not_scale_the_models_input_or_step_the_scaled_sample(make, tiny, relative_error, name, rule):
    given = tiny.arguments(name, num_inference_steps=9)
    (reference, *_) = tiny.call(make(name, rule), **given, return_dict=False)
    pipe = parallel(make(name, rule))
    (ours, *_) = tiny.call(pipe, **given, return_dict=False)
    assert relative_error(ours, reference).max() < 1e-3
    assert pipe.last_solution.converged.all()


SDE = {"algorithm_type": "sde-dpmsolver++"}
DRAWS = [
    ("sd", DPM, SDE | {"use_karras_sigmas": True}, {}),
    ("sd", DPM, SDE, {"generator": 2}),
    ("sd-img2img", DPM, SDE, {}),
    ("sd3", FLOW, {"stochastic_sampling": True}, {}),
    ("sd", ANCESTRAL, {}, {}),
    ("sd", DDPM, {}, {"generator": 2}),
    ("sd", "DDIMScheduler", {}, {"eta": 0.7}),
    ("sd", "LCMScheduler", {"clip_sample": False}, {}),
    ("dit", DDPM, {}, {}),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("name", "rule", "config", "changes"), DRAWS)
def test_noise_is_drawn_as_the_scheduler_draws_it(make, tiny, relative_error, name, rule, config, changes, dtype):
    given = tiny.arguments(name, **changes)
    reference_pipe, pipe = (make(name, rule, **config).to(dtype) for _ in range(2))
    (reference, *_) = tiny.call(reference_pipe, **given, return_dict=False)
    (ours, *_) = tiny.call(parallel(pipe, tol=1e-3), **given, return_dict=False)
    assert relative_error(ours, reference).max() < (1e-3 if dtype == torch.float64 else 6e-2)
    assert pipe.last_solution.converged.all()


def test_every_option_by_position_stays_there(make, tiny, relative_error):
    """A pipeline of a user's own that passes its condition by position, to a model that looks for it there."""

    class Own(diffusers.StableDiffusionPipeline):
        pass

    def own(pipe):
        kind, plain = type(pipe.unet), type(pipe.unet).forward

        class Positional(kind):
            def forward(self, *args, **kwargs):
                sample, timestep = args
                return plain(self, sample, timestep, **kwargs)

        pipe.unet.__class__ = Positional
        return pipe

    reference = tiny.call(own(make("sd")), **tiny.arguments("sd"))[0]
    pipe = parallel(own(make("sd")))
    assert relative_error(tiny.call(pipe, **tiny.arguments("sd"))[0], reference).max() < 1e-3
    assert pipe.last_solution.stats.finished_serially == 0


@pytest.mark.parametrize("rule", ["FlowMatchHeunDiscreteScheduler", FLOW])
@pytest.mark.parametrize("name", ["sd3-img2img", "flux-img2img", "sd3"])
def test_schedulers_whose_counters_are_set_before_the_loop(make, tiny, relative_error, name, rule):
    try:
        reference = tiny.call(make(name, rule), **tiny.arguments(name))[0]
    except (AttributeError, TypeError, ValueError) as error:
        pytest.skip(f"the plain pipeline does not take it: {error}")
    pipe = parallel(make(name, rule))
    ours = tiny.call(pipe, **tiny.arguments(name))[0]
    assert relative_error(ours, reference).max() < 1e-3
    assert pipe.last_solution.stats.finished_serially == 0


def test_custom_timesteps_of_ddpm(make, tiny, relative_error):
    steps = [999, 850, 736, 545, 343, 124, 24]
    given = tiny.arguments("sd", num_inference_steps=None, timesteps=steps)
    reference = tiny.call(make("sd", DDPM), **given)[0]
    pipe = parallel(make("sd", DDPM))
    assert relative_error(tiny.call(pipe, **given)[0], reference).max() < 1e-3
    assert pipe.last_solution.stats.finished_serially == 0


def test_a_terminal_signal_of_zero(make, tiny, relative_error):
    config = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    reference = tiny.call(make("sd", EULER, **config), **tiny.arguments("sd"))[0]
    ours = tiny.call(parallel(make("sd", EULER, **config)), **tiny.arguments("sd"))[0]
    assert relative_error(ours, reference).max() < 1e-3
    with pytest.raises(dq.NotAffineError, match="zero signal"):
        tiny.call(parallel(make("sd", "DDIMScheduler", **config)), **tiny.arguments("sd"))


@pytest.mark.skipif(not hasattr(diffusers, "BriaPipeline"), reason="diffusers before 0.36")
@pytest.mark.parametrize("batch", [1, 2])
def test_a_pipeline_that_looks_at_the_class_of_its_scheduler(tiny, relative_error, batch):
    def picture(change=lambda pipe: pipe, **options):
        torch.manual_seed(0)
        transformer = diffusers.BriaTransformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=16, axes_dims_rope=[2, 4, 2],
        )  # fmt: skip
        parts = {"transformer": transformer, "vae": tiny.conditioned.decoder(shift_factor=0.0)}
        pipe = change(tiny.families.assemble("BriaPipeline", parts, tiny.scheduler(FLOW)))
        given = {name: value[:batch] for name, value in tiny.conditioned.prompts().items()}
        given |= {"num_inference_steps": 6, "output_type": "latent", "height": 16, "width": 16, "guidance_scale": 3.0}
        return tiny.call(pipe, **given, **options).images

    assert relative_error(picture(parallel), picture()).max() < 1e-3
    if batch > 1:  # by the standard deviation over the batch
        with pytest.raises(dq.DeqDiffError, match="depends on their size"):
            picture(parallel, normalize=True)
    else:
        assert relative_error(picture(parallel, normalize=True), picture(normalize=True)).max() < 1e-3


class Tokenizer:
    def __call__(self, phrases, **settings):
        return Ids(input_ids=torch.zeros(len(phrases), 4, dtype=torch.long))


class Ids(dict):
    def to(self, device):
        return self


class TextEncoder(torch.nn.Module):
    dtype, device = torch.float32, torch.device("cpu")

    def forward(self, input_ids):
        drawn = torch.randn(len(input_ids), 16, generator=torch.Generator().manual_seed(2))
        return SimpleNamespace(pooler_output=drawn)


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_a_loop_that_switches_a_part_of_its_network_off(tiny, relative_error, share):
    """GLIGEN grounds boxes in the first steps only."""

    def pipeline():
        torch.manual_seed(0)
        unet = tiny.conditioned.unet(attention_type="gated")
        for name, weight in unet.named_parameters():
            if "alpha" in name:
                torch.nn.init.ones_(weight)
            elif "fuser" in name and weight.dim() == 2:
                weight.data.mul_(3)
        parts = {"vae": tiny.conditioned.decoder(), "unet": unet, "text_encoder": TextEncoder()}
        parts |= {"tokenizer": Tokenizer(), "requires_safety_checker": False}
        return tiny.families.assemble("StableDiffusionGLIGENPipeline", parts, tiny.scheduler("DDIMScheduler"))

    def picture(pipe):
        given = {name: value[:1] for name, value in tiny.conditioned.prompts().items()}
        given |= {"gligen_phrases": ["a"], "gligen_boxes": [[0.1, 0.1, 0.5, 0.6]]}
        draw = torch.Generator().manual_seed(1)
        return pipe(
            generator=draw, num_inference_steps=12, output_type="latent", height=8, width=8,
            gligen_scheduled_sampling_beta=share, **given,
        ).images  # fmt: skip

    reference, pipe = picture(pipeline()), pipeline()
    dq.integrations.diffusers.parallelize(pipe, solver="quasi-newton", tol=1e-5)
    assert relative_error(picture(pipe), reference).max() < 1e-4
    assert (pipe.last_solution.stats.finished_serially > 0) == (share < 1)
