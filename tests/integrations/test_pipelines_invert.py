"""`invert(pipe, image, prompt)` on tiny pipelines: the latents that it finds give the image's own latents back."""

from __future__ import annotations

import numpy as np
import pytest
import torch

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

import deqdiff_fast as dq  # noqa: E402
from deqdiff_fast.integrations.pipelines.invert import image_latents  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
diffusers.utils.logging.set_verbosity_error()
invert = dq.integrations.diffusers.invert
V = {"prediction_type": "v_prediction"}


@pytest.fixture
def images(tiny):
    size = tiny.SIZE
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def own_latents(pipe, images):
    with torch.no_grad():
        latents = image_latents(pipe, images)
    return pipe._pack_latents(latents, *latents.shape) if hasattr(pipe, "_pack_latents") else latents


def settings(name: str, scale: float) -> dict:
    given = {"num_inference_steps": 10, "negative_prompt": "blurry"}
    if name == "flux":
        return given | {"true_cfg_scale": scale, "max_sequence_length": 8}
    return given | {"guidance_scale": scale}


CASES = [
    ("sd", "DDIMScheduler", {}),
    ("sd", "DDIMScheduler", V),
    ("sd", "DPMSolverMultistepScheduler", {}),
    ("sdxl", "EulerDiscreteScheduler", V),
    ("sd3", None, {}),
    ("flux", None, {}),
]


@pytest.mark.parametrize("scale", [1.0, 7.5])
@pytest.mark.parametrize(("name", "rule", "config"), CASES)
def test_the_latents_found_give_the_image_back(make, images, relative_error, name, rule, config, scale):
    pipe = make(name, rule, **config)
    parts = dict(pipe.components)
    given = settings(name, scale)
    found = invert(pipe, images, "a cat", **given)
    assert pipe.components == parts
    assert found.converged.all()
    size = images.shape[-1]
    given |= {"prompt": ["a cat"] * 2, "negative_prompt": ["blurry"] * 2, "height": size, "width": size}
    again = pipe(latents=found.noise, output_type="latent", **given).images
    target = own_latents(pipe, images)
    assert relative_error(again, target).max() < 1e-3
    assert torch.allclose(relative_error(again, target), found.error, atol=1e-4)
    assert relative_error(found.reconstruction, target).max() < 1e-3
    noise = torch.randn(found.noise.shape, generator=torch.Generator().manual_seed(0))
    assert relative_error(pipe(latents=noise, output_type="latent", **given).images, target).min() > 0.1


def test_beyond_float32_an_image_inverts_in_float64(make, images, relative_error):
    if transformers.__version__ < "5":
        pytest.skip("text encoders of transformers 4 have no masks in float64")
    """Stable Diffusion XL, Euler, epsilon, guidance 7.5, and an image far from the sampler's range: the chain of this
    random network in float32 answers the last bit of its noise with about 1e-3. The solution itself exists."""
    given = settings("sdxl", 7.5)
    size = images.shape[-1]
    full = given | {"prompt": ["a cat"] * 2, "negative_prompt": ["blurry"] * 2, "height": size, "width": size}
    pipe = make("sdxl", "EulerDiscreteScheduler").to(torch.float64)
    found = invert(pipe, images.double(), "a cat", **given)
    assert found.converged.all()
    again = pipe(latents=found.noise, output_type="latent", **full).images
    assert relative_error(again, own_latents(pipe, images.double())).max() < 1e-3
    pipe, noise = make("sdxl", "EulerDiscreteScheduler"), found.noise.float()
    starts = (noise, noise.nextafter(torch.full_like(noise, torch.inf)))
    single = [pipe(latents=start, output_type="latent", **full).images for start in starts]
    assert relative_error(single[1], single[0]).max() > 1e-4, "a thousand times what was changed"


@pytest.mark.parametrize("rule", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_what_the_sampler_made_inverts_in_float32(make, images, relative_error, rule, scale):
    pipe, given, size = make("sdxl", rule), settings("sdxl", scale), images.shape[-1]
    full = given | {"prompt": ["a cat"] * 2, "negative_prompt": ["blurry"] * 2, "height": size, "width": size}
    image = pipe(generator=torch.Generator().manual_seed(3), output_type="latent", **full).images
    found = invert(pipe, image, "a cat", **given)
    assert found.converged.all()
    assert relative_error(pipe(latents=found.noise, output_type="latent", **full).images, image).max() < 1e-3


def test_one_picture_of_any_kind_and_a_parallel_pipeline(make, images, relative_error):
    pipe = dq.integrations.diffusers.parallelize(make("sd", "DDIMScheduler", **V), solver="quasi-newton", tol=1e-5)
    array = (images[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    picture = pytest.importorskip("PIL.Image").fromarray(array)
    kinds = [picture, array[None] / 255, torch.from_numpy(array / 255).permute(2, 0, 1)[None].float()]
    found = [invert(pipe, kind, "a dog", num_inference_steps=8, guidance_scale=2.0) for kind in kinds]
    assert all(torch.allclose(f.noise, found[0].noise, atol=1e-4) for f in found)
    given = {"num_inference_steps": 8, "guidance_scale": 2.0}
    again = pipe("a dog", latents=found[0].noise, output_type="latent", **given).images
    assert pipe.last_solution.stats.solver == "quasi-newton"
    assert relative_error(again, own_latents(pipe, kinds[2])).max() < 1e-3
    latents = own_latents(pipe, kinds[2])
    direct = invert(pipe, latents, "a dog", num_inference_steps=8, guidance_scale=2.0)
    assert torch.allclose(direct.noise, found[0].noise, atol=1e-4)


def test_the_noise_of_a_stochastic_scheduler_is_that_of_the_generator(make, images, relative_error):
    pipe = make("sd", "DDIMScheduler", **V)
    given = {"num_inference_steps": 8, "guidance_scale": 3.0, "eta": 0.5}
    found = invert(pipe, images[:1], "a cat", generator=torch.Generator().manual_seed(4), **given)
    again = pipe(
        "a cat", latents=found.noise, generator=torch.Generator().manual_seed(4), output_type="latent", **given
    ).images
    assert relative_error(again, own_latents(pipe, images[:1])).max() < 1e-3


def test_refusals(make, tiny, images, tmp_path):
    for name in ("ddim", "dit"):
        with pytest.raises(TypeError, match="text-to-image"):
            invert(tiny.build(name, tmp_path), images)
    with pytest.raises(TypeError, match="StableDiffusionImg2ImgPipeline"):
        invert(make("sd-img2img"), images, "a cat")
    pipe = make("sd")
    with pytest.raises(ValueError, match="num_images_per_prompt"):
        invert(pipe, images, "a cat", num_images_per_prompt=2)
    with pytest.raises(ValueError, match="tol"):
        invert(pipe, images, "a cat", tol=0.0)
    with pytest.raises(ValueError, match="nonsense"):
        invert(pipe, images, "a cat", nonsense=1)
    with pytest.raises(dq.NotConvergedError, match="not reproduced"):
        invert(pipe, images, "a cat", num_inference_steps=4, tol=1e-12, on_failure="raise")
