"""Tiny diffusers pipelines that are conditioned on pictures or guided in other ways, as those of tiny_families.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import torch
from tiny_families import DPM, EULER, FLOW, LENGTH, Family, draw

DDIM = "DDIMScheduler"
SIZE = 8  # of pictures and latents: the decoder has one block
CROSS = {
    "sample_size": SIZE, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4,
    "attention_head_dim": 4, "cross_attention_dim": 16, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
}  # fmt: skip
UP = {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
XL = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 64}
NO_CHECKER = {"requires_safety_checker": False}


def picture(seed: int = 7, batch: int = 2, size: int = SIZE) -> torch.Tensor:
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def mask() -> torch.Tensor:
    given = torch.zeros(2, 1, SIZE, SIZE)
    given[0, :, 2:7, 1:5] = given[1, :, :4] = 1.0
    return given


def prompts(pooled: int = 0, negative: bool = True, width: int = 16) -> dict[str, Any]:
    """Embeddings with and without a prompt, in the names that most pipelines have for them."""
    given = {"prompt_embeds": draw(2, LENGTH, width, seed=1)}
    if pooled:
        given["pooled_prompt_embeds"] = draw(2, pooled, seed=3)
    if negative:
        given["negative_prompt_embeds"] = draw(2, LENGTH, width, seed=2)
    if negative and pooled:
        given["negative_pooled_prompt_embeds"] = draw(2, pooled, seed=4)
    return given


def decoder(channels: int = 4, **config: Any) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=channels, sample_size=SIZE, scaling_factor=1.5,
        **config,
    )  # fmt: skip


def unet(**config: Any) -> Any:
    return diffusers.UNet2DConditionModel(**CROSS, **UP, **config)


def sd_inpaint(channels: int = 9) -> Family:
    parts = {"vae": decoder(), "unet": unet(in_channels=channels), **NO_CHECKER}
    given = prompts() | {"image": picture(), "mask_image": mask(), "height": SIZE, "width": SIZE, "guidance_scale": 3.0}
    return "StableDiffusionInpaintPipeline", DPM, parts, given


def sd_inpaint_plain() -> Family:
    kind, rule, parts, given = sd_inpaint(4)
    return kind, rule, parts, given | {"strength": 0.8}


def flux_inpaint() -> Family:
    parts = {"vae": decoder(shift_factor=0.06), "transformer": flux_transformer()}
    given = prompts(pooled=16, negative=False) | {"image": picture(), "mask_image": mask(), "strength": 0.9}
    return "FluxInpaintPipeline", FLOW, parts, given | {"height": SIZE, "width": SIZE}


def controlnet(**config: Any) -> Any:
    own = {name: value for name, value in CROSS.items() if name != "sample_size"}
    model = diffusers.ControlNetModel(**own, conditioning_embedding_out_channels=(4,), **config)
    with torch.no_grad():  # its last layers begin as zeros
        for name, weight in model.named_parameters():
            if "controlnet" in name:
                weight.copy_(0.1 * draw(*weight.shape))
    return model


def sd_controlnet() -> Family:
    parts = {"vae": decoder(), "unet": unet(), "controlnet": controlnet(), **NO_CHECKER}
    given = prompts() | {"image": picture(), "height": SIZE, "width": SIZE, "guidance_scale": 3.0}
    return "StableDiffusionControlNetPipeline", DPM, parts, given


def sdxl_controlnet() -> Family:
    _, _, parts, given = sd_controlnet()
    parts = {"vae": decoder(), "unet": unet(**XL), "controlnet": controlnet(**XL)}
    return "StableDiffusionXLControlNetPipeline", EULER, parts, given | prompts(pooled=16)


def flux_transformer(channels: int = 16, out: int = 16) -> Any:
    return diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=channels, out_channels=out, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=16, guidance_embeds=True,
        axes_dims_rope=(2, 4, 2),
    )  # fmt: skip


def flux_kontext() -> Family:
    parts = {"vae": decoder(shift_factor=0.06), "transformer": flux_transformer()}
    given = prompts(pooled=16) | {"image": picture(batch=1), "true_cfg_scale": 2.0, "height": SIZE, "width": SIZE}
    return "FluxKontextPipeline", FLOW, parts, given | {"_auto_resize": False, "max_area": SIZE * SIZE}


def flux_fill() -> Family:
    parts = {"vae": decoder(shift_factor=0.06), "transformer": flux_transformer(36, 16)}
    given = prompts(pooled=16, negative=False) | {"image": picture(), "mask_image": mask()}
    return "FluxFillPipeline", FLOW, parts, given | {"height": SIZE, "width": SIZE}


def flux_controlnet() -> Family:
    model = diffusers.FluxControlNetModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, guidance_embeds=True, axes_dims_rope=(2, 4, 2),
    )  # fmt: skip
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "controlnet" in name:
                weight.copy_(0.1 * draw(*weight.shape))
    parts = {"vae": decoder(shift_factor=0.06), "transformer": flux_transformer(), "controlnet": model}
    given = prompts(pooled=16) | {"control_image": picture(), "true_cfg_scale": 2.0, "height": SIZE, "width": SIZE}
    return "FluxControlNetPipeline", FLOW, parts, given


def marigold() -> Family:
    model = unet(in_channels=8)
    given = {"image": picture(), "processing_resolution": 0, "match_input_resolution": False, "output_type": "pt"}
    parts = {"vae": decoder(), "unet": model, "prediction_type": "depth", ".empty_text_embedding": draw(1, 2, 16)}
    return "MarigoldDepthPipeline", DDIM, parts, given | {"batch_size": 2}


def marigold_in_turn() -> Family:
    """Two pictures one after the other: two loops in one call."""
    kind, rule, parts, given = marigold()
    return kind, rule, parts, given | {"batch_size": 1}


def sd_ip_adapter() -> Family:
    model = unet()
    keys, number = {}, 1
    for name in model.attn_processors:
        if "attn2" in name:
            width = 16 if "mid_block" in name or "down_blocks.1" in name or "up_blocks.0" in name else 8
            keys[f"{number}.to_k_ip.weight"] = draw(width, 16, seed=number)
            keys[f"{number}.to_v_ip.weight"] = draw(width, 16)
            number += 2
    project = {
        "proj.weight": draw(4 * 16, 16), "proj.bias": draw(4 * 16), "norm.weight": torch.ones(16),
        "norm.bias": torch.zeros(16),
    }  # fmt: skip
    model._load_ip_adapter_weights([{"image_proj": project, "ip_adapter": keys}])
    parts = {"vae": decoder(), "unet": model, **NO_CHECKER}
    given = prompts() | {"height": SIZE, "width": SIZE, "guidance_scale": 3.0}
    return "StableDiffusionPipeline", DPM, parts, given | {"ip_adapter_image_embeds": [draw(2, 1, 16, seed=9)]}


def sd_perturbed() -> Family:
    """Perturbed-attention guidance (Ahn et al. 2024, arXiv 2403.17377): three rows a sample."""
    parts = {"vae": decoder(), "unet": unet(), "pag_applied_layers": ["mid"], **NO_CHECKER}
    given = prompts() | {"height": SIZE, "width": SIZE, "guidance_scale": 3.0, "pag_scale": 2.0}
    return "StableDiffusionPAGPipeline", DPM, parts, given


def sd3_skipped_layers() -> Family:
    """Skip-layer guidance in some steps: a third call there."""
    model = diffusers.SD3Transformer2DModel(
        sample_size=SIZE, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16, out_channels=4,
        pos_embed_max_size=8,
    )  # fmt: skip
    given = prompts(pooled=16) | {"height": 64, "width": 64, "skip_guidance_layers": [0], "guidance_scale": 3.0}
    return "StableDiffusion3Pipeline", FLOW, {"transformer": model}, given | {"skip_layer_guidance_stop": 0.6}


@contextmanager
def known_classes() -> Iterator[None]:
    """Raises ImportError where the installed diffusers has not got a class that is asked for."""
    try:
        yield
    except AttributeError as error:
        if not str(error).startswith("module diffusers"):
            raise
        raise ImportError(f"diffusers {diffusers.__version__}: {error}") from error


FAMILIES: dict[str, Callable[[], Family]] = {
    "sd-inpaint": sd_inpaint, "sd-inpaint-plain": sd_inpaint_plain, "sd-controlnet": sd_controlnet,
    "sdxl-controlnet": sdxl_controlnet, "flux-kontext": flux_kontext, "flux-fill": flux_fill,
    "flux-inpaint": flux_inpaint, "flux-controlnet": flux_controlnet, "marigold": marigold,
    "marigold-in-turn": marigold_in_turn, "sd-ip-adapter": sd_ip_adapter, "sd-perturbed": sd_perturbed,
    "sd3-skipped-layers": sd3_skipped_layers,
}  # fmt: skip
