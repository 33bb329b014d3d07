"""What the supported diffusers pipelines have in common with each other, and where they differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...model.guidance import combine

_ANY = {"generator", "num_inference_steps", "output_type", "return_dict"}
_TEXT = _ANY | {
    "prompt", "negative_prompt", "height", "width", "guidance_scale", "num_images_per_prompt", "latents",
    "prompt_embeds", "negative_prompt_embeds", "callback_on_step_end", "callback_on_step_end_tensor_inputs",
    "callback", "callback_steps", "sigmas", "clip_skip", "image", "strength",
}  # fmt: skip
_UNET = _TEXT | {"timesteps", "eta", "guidance_rescale", "cross_attention_kwargs"}
_SECOND = {"prompt_2", "negative_prompt_2", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"}
_XL = _UNET | _SECOND | {
    "denoising_start", "denoising_end", "original_size", "target_size", "crops_coords_top_left", "aesthetic_score",
    "negative_original_size", "negative_target_size", "negative_crops_coords_top_left", "negative_aesthetic_score",
}  # fmt: skip
_MMDIT = _TEXT | _SECOND | {"joint_attention_kwargs", "max_sequence_length"}


@dataclass(frozen=True)
class Guidance:
    """scale and rescale as in diffusers; positive_first: the halves come as (with prompt, without)."""

    scale: float
    rescale: float
    positive_first: bool

    def combine(self, parts: list[Tensor]) -> Tensor:
        """The prediction from one part (no guidance) or two, each (n, *shape)."""
        if len(parts) == 1:
            return parts[0]
        positive, negative = parts if self.positive_first else reversed(parts)
        return combine(negative, positive, self.scale, self.rescale)


@dataclass(frozen=True)
class Family:
    """One kind of pipeline."""

    denoiser: str  # the attribute that holds the model
    inputs: str  # the name of the model's first argument
    options: frozenset[str]  # arguments of the pipeline's call that are supported
    shared: frozenset[str] = frozenset()  # inputs of the model that have no batch dimension
    divisor: float | None = None  # of the scheduler's timestep in the dtype of the latents; None: as the scheduler's
    positive_first: bool = False  # the order of the two halves of classifier-free guidance
    doubled: bool = False  # the pipeline steps both halves, which stay equal
    variance: bool = False  # the model may also predict a variance, in further channels that are dropped
    scale: str = ""  # the argument that holds the guidance scale, where the pipeline has no attribute for it

    def model_timestep(self, timestep: Tensor, x: Tensor) -> Tensor:
        """The model's timesteps from the scheduler's; x: the model's input."""
        return timestep if self.divisor is None else timestep.to(x.dtype) / self.divisor

    def guidance(self, pipe: Any, arguments: dict[str, Any]) -> Guidance:
        """As the pipeline has set it by now; callbacks may change it on the way."""
        scale = arguments.get(self.scale) if self.scale else getattr(pipe, "_guidance_scale", None)
        rescale = "guidance_rescale" in arguments and getattr(pipe, "_guidance_rescale", None)
        return Guidance(float(scale or 0.0), float(rescale or 0.0), self.positive_first)

    def channels(self, denoiser: Any, x: Tensor) -> int:
        """Size of dimension 1 of the model's output."""
        own = denoiser.config.out_channels if self.variance else None
        return int(own or x.shape[1])


_UNCONDITIONAL = Family("unet", "sample", frozenset(_ANY | {"batch_size", "eta", "use_clipped_model_output"}))
_DIT = Family(
    "transformer", "hidden_states", frozenset(_ANY | {"class_labels", "guidance_scale"}),
    positive_first=True, doubled=True, variance=True, scale="guidance_scale",
)  # fmt: skip
_STABLE_DIFFUSION = Family("unet", "sample", frozenset(_UNET))
_STABLE_DIFFUSION_XL = Family("unet", "sample", frozenset(_XL))
_STABLE_DIFFUSION_3 = Family(
    "transformer", "hidden_states", frozenset(_MMDIT | {"prompt_3", "negative_prompt_3", "mu"})
)
_FLUX = Family(
    "transformer", "hidden_states", frozenset(_MMDIT | {"true_cfg_scale"}),
    shared=frozenset({"txt_ids", "img_ids"}), divisor=1000.0, positive_first=True, scale="true_cfg_scale",
)  # fmt: skip

FAMILIES: dict[str, Family] = {
    "DDIMPipeline": _UNCONDITIONAL,
    "DDPMPipeline": _UNCONDITIONAL,
    "DiTPipeline": _DIT,
    "StableDiffusionPipeline": _STABLE_DIFFUSION,
    "StableDiffusionImg2ImgPipeline": _STABLE_DIFFUSION,
    "StableDiffusionXLPipeline": _STABLE_DIFFUSION_XL,
    "StableDiffusionXLImg2ImgPipeline": _STABLE_DIFFUSION_XL,
    "StableDiffusion3Pipeline": _STABLE_DIFFUSION_3,
    "StableDiffusion3Img2ImgPipeline": _STABLE_DIFFUSION_3,
    "FluxPipeline": _FLUX,
    "FluxImg2ImgPipeline": _FLUX,
}


def family_of(pipe: Any) -> Family:
    """The family of a pipeline. Raises TypeError with the supported ones."""
    for base in type(pipe).__mro__:
        if base.__name__ in FAMILIES and base.__module__.startswith("diffusers."):
            return FAMILIES[base.__name__]
    raise TypeError(
        f"pipe: expected one of {', '.join(FAMILIES)}, got {type(pipe).__name__}; for another model use "
        "DEQSampler(model, Schedule.from_diffusers(pipe.scheduler, steps)) in a loop of your own"
    )
