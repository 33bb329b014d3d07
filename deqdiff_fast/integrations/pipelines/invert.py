"""`invert(pipe, image, prompt)`: the initial latents from which a pipeline makes a given image."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...inverter import DEQInverter, Inversion
from ...schedule import Schedule
from .components import Component, denoisers
from .intercepted_loop import InterceptedLoop
from .parallel import given_arguments, plain_class
from .problem import DenoisingProblem
from .proxies import installed
from .random_state import RandomState

_OWN = set(inspect.signature(DEQInverter.__init__).parameters) - {"self", "model", "schedule", "options"}


def invert(
    pipe: Any, image: Any, prompt: Any = None, *, num_inference_steps: int = 50, generator: Any = None, **options: Any
) -> Inversion:
    """Find the latents from which a text-to-image pipeline makes an image: what to pass as its `latents`.

    Args:
        pipe: a text-to-image pipeline (Stable Diffusion, Stable Diffusion XL, 3, Flux), parallelized or not, with
            its scheduler as it is; guidance, multistep rules and noise are part of the chain that is inverted.
        image: anything that the pipeline's image processor takes (PIL, arrays, tensors in [0, 1]), one or a batch, or
            latents (B, C, h, w), with as many channels as the pipeline's decoder wants.
        prompt: one for all, or one for each image.
        num_inference_steps: T.
        generator: that of the later call, in the same state, for a scheduler that adds noise.
        **options: further arguments of the pipeline's call (guidance_scale, negative_prompt ...) and those of
            `DEQInverter` (method, tol, max_rounds, window, on_failure ...).

    Returns:
        An `Inversion`: `noise` (B, ...) are the latents to pass, `reconstruction` what the serial chain makes of them,
        `error` its relative L2 distance from the image's own latents, which the decoder turns into the image (up to
        what the autoencoder itself loses). Call the pipeline with the same arguments otherwise.

    Raises:
        TypeError: another pipeline.
        ValueError: an argument that is not supported. And as `DEQInverter`.
    """
    components = denoisers(pipe)
    takes = set(inspect.signature(plain_class(pipe).__call__).parameters)
    if not {"latents", "prompt"} <= takes or "image" in takes:
        raise TypeError(f"pipe: expected a text-to-image pipeline that takes latents, got {type(pipe).__name__}")
    for name in ("latents", "num_images_per_prompt", "callback_on_step_end", "output_type"):
        if name in options:
            raise ValueError(f"{name}: has no meaning here; pass one image for each sample, and nothing else")
    settings = {name: options.pop(name) for name in list(options) if name in _OWN}
    given_arguments(pipe, (), options | {"prompt": prompt})  # refuses what there is not, before the decoder is asked
    DEQInverter(lambda x, t: x, Schedule.ddim([0.9, 0.5], [1, 0]), **settings)
    with torch.no_grad():
        target = image_latents(pipe, image)
        size = {"height": target.shape[2] * pipe.vae_scale_factor, "width": target.shape[3] * pipe.vae_scale_factor}
        if hasattr(pipe, "_pack_latents"):
            target = pipe._pack_latents(target, *target.shape)
        texts = {"prompt": prompt, **options}
        for name, text in texts.items():
            if "prompt" in name and isinstance(text, str):
                texts[name] = [text] * len(target)
        arguments = {"num_inference_steps": num_inference_steps, "generator": generator, "latents": target}
        problem = record(pipe, components, size | texts | arguments | {"output_type": "latent"})
        scale = float((problem.start * target).sum() / target.square().sum())
        if not torch.allclose(problem.start, scale * target, rtol=1e-3, atol=1e-5 * scale):
            raise ValueError(f"latents: {type(pipe).__name__} does more to them than a multiplication by a number")
        inverter = DEQInverter(problem.model, problem.schedule, **settings)
        noise, before = problem.generator, RandomState(problem.generator, target.device)
        if noise is not None:  # as the pipeline's scheduler will draw it; the generator stays as it is
            noise = problem.frozen(problem.noises())
            before.restore()
        found = inverter.invert(target, problem.rows(), noise)
    return replace(found, noise=found.noise / scale)


def image_latents(pipe: Any, image: Any) -> Tensor:
    """(B, C, h, w): the latents of an image, the most likely ones of its encoder, as the denoiser wants them."""
    vae, device = pipe.vae, pipe._execution_device
    dtype = (pipe.unet if hasattr(pipe, "unet") else pipe.transformer).dtype
    config = vae.config
    if isinstance(image, Tensor) and image.dim() == 4 and image.shape[1] == config.latent_channels != 3:
        return image.to(device, dtype)
    exact = vae.dtype == torch.float16 and bool(getattr(config, "force_upcast", False))  # overflows in float16
    before = vae.dtype
    if exact:
        vae.to(dtype=torch.float32)
    pixels = pipe.image_processor.preprocess(image).to(device, vae.dtype)
    latents: Tensor = vae.encode(pixels).latent_dist.mode()
    if exact:
        vae.to(dtype=before)
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is not None and std is not None:
        mean, std = (torch.tensor(v, device=device, dtype=latents.dtype).view(1, -1, 1, 1) for v in (mean, std))
        latents = (latents - mean) / std
    else:
        latents = latents - (getattr(config, "shift_factor", None) or 0.0)
    scaled: Tensor = latents * config.scaling_factor
    return scaled.to(dtype)


class _Recorded(Exception):
    """Ends a pipeline's call at the first step of its loop."""


class _Recorder(InterceptedLoop):
    problem: DenoisingProblem | None = None

    def _solved_chain(self, problem: DenoisingProblem) -> Any:
        self.problem = problem
        raise _Recorded


def record(pipe: Any, components: dict[str, Component], arguments: dict[str, Any]) -> DenoisingProblem:
    """What a call of the pipeline would compute; its networks are called only where it is not known what they return,
    or where they have parts of a user's own."""
    plain = plain_class(pipe).__call__
    loop = _Recorder(pipe, components, {"on_failure": "raise"}, given_arguments(pipe, (), arguments))
    vars(pipe).pop("_num_timesteps", None)
    bar = vars(pipe).get("_progress_bar_config")
    pipe.set_progress_bar_config(disable=True)
    try:
        with installed(pipe, loop.proxies):
            plain(pipe, **arguments)
    except _Recorded:
        pass
    finally:
        pipe.set_progress_bar_config(**(bar or {}))
        pipe.maybe_free_model_hooks()
    if loop.problem is None:
        raise ValueError(f"num_inference_steps: {type(pipe).__name__} makes no step with these arguments")
    return loop.problem
