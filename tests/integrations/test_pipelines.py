"""`parallelize(pipe)` on tiny pipelines of every family, against the untouched pipelines."""

from __future__ import annotations

import copy
import pickle
import re
import runpy
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import deqdiff_fast as dq  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
diffusers.utils.logging.set_verbosity_error()
ROOT = Path(__file__).resolve().parents[2]


def parallel(pipe, **options):
    return dq.integrations.diffusers.parallelize(pipe, **({"solver": "quasi-newton", "tol": 1e-4} | options))


DPM, EULER, FLOW = "DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"
V = {"prediction_type": "v_prediction"}
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
CASES = [
    ("ddim", "DDIMScheduler", {}, {}),
    ("ddim", "DDIMScheduler", {}, {"eta": 0.6, "generator": 2}),
    ("ddpm", "DDPMScheduler", {}, {}),
    ("ddpm", DPM, {}, {"batch_size": 1}),
    ("dit", "DDIMScheduler", {}, {}),
    ("dit", DPM, {}, {"guidance_scale": 1.0}),
    ("dit", "DDPMScheduler", {}, {}),
    ("sd", "DDIMScheduler", {}, {"eta": 0.5, "num_images_per_prompt": 2}),
    ("sd", "DDIMScheduler", V | ZERO_SNR, {"guidance_rescale": 0.7}),
    ("sd", DPM, {}, {"generator": 2}),
    ("sd", DPM, {"algorithm_type": "sde-dpmsolver++"}, {"generator": 2}),
    ("sd", EULER, V, {"guidance_scale": 1.0}),
    ("sd", "EulerAncestralDiscreteScheduler", {}, {}),
    ("sd", "PNDMScheduler", {"skip_prk_steps": True}, {}),
    ("sd", "HeunDiscreteScheduler", {}, {}),
    ("sd-img2img", "DDIMScheduler", {}, {"eta": 0.3}),
    ("sd-img2img", DPM, {}, {"num_images_per_prompt": 2}),
    ("sd-img2img", EULER, {}, {}),
    ("sd-img2img", "PNDMScheduler", {"skip_prk_steps": True}, {}),
    ("sdxl", "DDIMScheduler", {}, {"guidance_rescale": 0.5}),
    ("sdxl", DPM, {}, {"num_images_per_prompt": 2, "generator": 4}),
    ("sdxl", EULER, {}, {"denoising_end": 0.6}),
    ("sdxl-img2img", DPM, {}, {}),
    ("sdxl-img2img", EULER, {}, {"denoising_start": 0.4}),
    ("sd3", FLOW, {}, {}),
    ("sd3", FLOW, {"stochastic_sampling": True}, {"guidance_scale": 1.0, "num_images_per_prompt": 2}),
    ("sd3-img2img", FLOW, {}, {"generator": 2}),
    ("flux", FLOW, {}, {}),
    ("flux", FLOW, {"use_dynamic_shifting": True}, {"true_cfg_scale": 1.0, "num_images_per_prompt": 2}),
    ("flux-img2img", FLOW, {}, {}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "rule", "config", "changes"), CASES)
def test_the_same_latents_as_the_untouched_pipeline(make, tiny, relative_error, name, rule, config, changes):
    given = tiny.arguments(name, **changes)
    (reference, *_) = tiny.call(make(name, rule, **config), **given, return_dict=False)
    pipe = make(name, rule, **config)
    assert parallel(pipe) is pipe
    assert pipe.last_solution is None
    (latents, *_) = tiny.call(pipe, **given, return_dict=False)
    assert latents.shape == reference.shape
    assert relative_error(latents, reference).max() < 1e-3
    stats = pipe.last_solution.stats
    assert pipe.last_solution.converged.all()
    assert stats.finished_serially == 0
    assert 0 < stats.rounds <= (2 if rule == "HeunDiscreteScheduler" else 1) * (tiny.STEPS + 1)
    assert stats.solver == "quasi-newton"
    assert tiny.call(pipe, **given)[0].shape == reference.shape  # and again


def test_every_family_is_covered(make, tiny):
    assert {name for name, *_ in CASES} == set(tiny.BUILDERS)


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux"])
def test_given_latents_and_decoded_images(make, tiny, relative_error, name):
    plain, pipe = make(name), parallel(make(name))
    given = tiny.arguments(name, output_type="latent")
    shape = tiny.call(plain, **given)[0].shape
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(9))
    reference, ours = (tiny.call(p, **given | {"latents": latents, "output_type": "np"}) for p in (plain, pipe))
    assert type(ours) is type(reference)
    assert abs(ours.images - reference.images).max() < 1e-3
    assert relative_error(pipe.last_solution.sample, tiny.call(plain, **given, latents=latents)[0]).max() < 1e-3
    assert tiny.call(pipe, **given | {"output_type": "pil"}).images[0].size == (tiny.SIZE, tiny.SIZE)


def test_a_progress_bar_counts_all_steps_and_obeys_its_settings(make, tiny, capsys):
    pipe = parallel(make("sd", DPM))
    pipe.set_progress_bar_config(disable=False, desc="parallel")
    tiny.call(pipe, **tiny.arguments("sd"))
    shown = capsys.readouterr().err
    assert f"{tiny.STEPS}/{tiny.STEPS}" in shown
    assert "parallel" in shown
    pipe.set_progress_bar_config(disable=True)
    tiny.call(pipe, **tiny.arguments("sd"))
    assert capsys.readouterr().err == ""


def test_unknown_arguments_are_refused_before_any_work(make, tiny):
    pipe = parallel(make("flux"))
    pipe.text_encoder.register_forward_pre_hook(lambda *_: pytest.fail("work was done"))
    with pytest.raises(TypeError, match="nonsense"):
        pipe(nonsense=1)
    with pytest.raises(TypeError, match="nonsense"):
        parallel(pipe, nonsense=1)


def test_bad_options_and_other_pipelines_are_refused(make):
    pipe = make("sd")
    with pytest.raises(ValueError, match="tol"):
        parallel(pipe, tol=-1.0)
    for wrong in (object(), pipe.unet):
        with pytest.raises(TypeError, match="network whose forward takes a timestep"):
            parallel(wrong)
    assert type(pipe) is diffusers.StableDiffusionPipeline


def test_a_scheduler_that_is_not_affine_is_refused_with_the_reason(make, tiny):
    pipe = parallel(make("sd", DPM, thresholding=True))
    with pytest.raises(dq.NotAffineError, match="thresholding"):
        tiny.call(pipe, **tiny.arguments("sd"))
    assert isinstance(vars(pipe)["unet"], torch.nn.Module)
    assert type(vars(pipe)["scheduler"]) is diffusers.DPMSolverMultistepScheduler


def test_guidance_that_is_not_known_is_noticed_and_not_replaced(make, tiny, relative_error, monkeypatch):
    from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion as module

    given = tiny.arguments("sd", guidance_rescale=0.5)
    monkeypatch.setattr(module, "rescale_noise_cfg", lambda cfg, text, guidance_rescale: cfg.abs() * 0.9)
    with pytest.raises(dq.DeqDiffError, match="combines its model's outputs"):
        tiny.call(parallel(make("sd")), **given)
    monkeypatch.setattr(module, "rescale_noise_cfg", lambda cfg, text, guidance_rescale: cfg * 0.9 - 0.3 * text)
    reference, ours = (tiny.call(pipe, **given)[0] for pipe in (make("sd"), parallel(make("sd"))))
    assert relative_error(ours, reference).max() < 1e-3  # linear, whatever it is


def test_the_pipeline_stays_what_it_was(make, tiny, tmp_path):
    pipe = make("sd", EULER)
    config, unet, scheduler = dict(pipe.config), pipe.unet, pipe.scheduler
    parallel(parallel(pipe), tol=1e-3)
    assert isinstance(pipe, diffusers.StableDiffusionPipeline)
    during = {}

    def check(pipe, index, timestep, tensors):
        during.update(unet=isinstance(pipe.unet, diffusers.UNet2DConditionModel), device=pipe.device, dtype=pipe.dtype)
        during.update(
            scheduler=isinstance(pipe.scheduler, diffusers.EulerDiscreteScheduler), parts=len(pipe.components)
        )
        return {}

    tiny.call(pipe, **tiny.arguments("sd"), callback_on_step_end=check)
    assert during == {
        "unet": True, "scheduler": True, "device": torch.device("cpu"), "dtype": torch.float32,
        "parts": len(pipe.components),
    }  # fmt: skip
    assert (dict(pipe.config), pipe.unet, pipe.scheduler) == (config, unet, scheduler)
    pipe.save_pretrained(tmp_path / "saved")
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "saved", safety_checker=None)
    assert type(again) is diffusers.StableDiffusionPipeline
    other = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    assert type(other) is diffusers.StableDiffusionImg2ImgPipeline
    assert dq.integrations.diffusers.restore(pipe) is pipe
    assert type(pipe) is diffusers.StableDiffusionPipeline
    assert not hasattr(pipe, "last_solution")


def test_offloading_finds_the_components_themselves(make, tiny, monkeypatch):
    pipe = parallel(make("sd"))
    found = []
    monkeypatch.setattr(
        diffusers.StableDiffusionPipeline, "maybe_free_model_hooks", lambda self: found.append(vars(self)["unet"])
    )
    tiny.call(pipe, **tiny.arguments("sd"))
    assert found == [pipe.unet]
    assert type(found[0]) is diffusers.UNet2DConditionModel


def test_the_default_solver_gives_the_promised_accuracy(make, tiny, relative_error):
    pipe = dq.integrations.diffusers.parallelize(make("sd"))
    ours = tiny.call(pipe, **tiny.arguments("sd", num_inference_steps=10))[0]
    reference = tiny.call(make("sd"), **tiny.arguments("sd", num_inference_steps=10))[0]
    assert relative_error(ours, reference).max() < 1e-2


def scripts() -> list[str]:
    """examples/pipeline.py, and the blocks of the README that make a pipeline parallel."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", readme, re.S)
    example = (ROOT / "examples" / "pipeline.py").read_text(encoding="utf-8")
    return [example, *(block for block in blocks if "parallelize(pipe" in block)]


@pytest.mark.parametrize("number", range(len(scripts())))
def test_a_users_script_runs_unchanged(make, tiny, tmp_path, monkeypatch, number):
    """In a folder where the name of the model is that of a folder, as diffusers looks for it."""
    source = scripts()[number]
    (name,) = set(re.findall(r'from_pretrained\("([^"]+)"', source))
    make("sd", "PNDMScheduler", skip_prk_steps=True).save_pretrained(tmp_path / name)
    (tmp_path / "script.py").write_text(source, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    known = runpy.run_path("script.py")
    assert known["pipe"].last_solution.converged.all()
    (image,) = tmp_path.glob("*.png")
    with PIL.Image.open(image) as picture:
        assert picture.size == (tiny.SIZE, tiny.SIZE)
    plain = diffusers.StableDiffusionPipeline.from_pretrained(name, safety_checker=None)
    reference = plain("a photo of a cat", num_inference_steps=50, generator=torch.Generator().manual_seed(0))
    assert np.abs(np.asarray(reference.images[0], float) - np.asarray(known["image"], float)).mean() < 2


@pytest.mark.parametrize("way", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))])
def test_a_parallel_pipeline_can_be_copied_and_pickled(make, tiny, way):
    pipe = parallel(make("ddim"), memory=dq.SolverMemory())
    given = tiny.arguments("ddim")
    expected = tiny.call(pipe, **given).images
    other = way(pipe)
    assert type(other) is type(pipe)
    assert torch.equal(other.last_solution.sample, pipe.last_solution.sample)
    assert np.array_equal(np.asarray(tiny.call(other, **given).images), np.asarray(expected))
    assert other.last_solution is not pipe.last_solution
    assert type(dq.integrations.diffusers.restore(other)) is type(make("ddim"))
