"""Every supported diffusers pipeline, tiny, with random weights, built from configurations: nothing is downloaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch

SIZE = 8  # of the latents; images are as large, since the decoder has one block
WORDS = ("a", "cat", "dog", "hat", "photo", "of", "blurry")
QUIET = {"disable": True}
LOUDER = {"attn2.to_v": 6, "attn2.to_out": 6, "class_embedder": 6, "context_embedder": 2, "text_embedder": 2}


def tokenizer(folder: Path) -> Any:
    """A CLIP tokenizer for WORDS."""
    from transformers import CLIPTokenizer

    pieces = ["<|startoftext|>", "<|endoftext|>"]
    letters = sorted({letter for word in WORDS for letter in word})
    merges, known = [], [*letters, *(f"{letter}</w>" for letter in letters)]
    for word in WORDS:
        left = word[0]
        for k, letter in enumerate(word[1:], 2):
            right = letter + ("</w>" if k == len(word) else "")
            merges.append(f"{left} {right}")
            left += right
            known.append(left)
    vocabulary = {piece: k for k, piece in enumerate(dict.fromkeys([*pieces, *known]))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(dict.fromkeys(merges)), encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def text_encoder(width: int = 16, projection: bool = False) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=64, hidden_size=width, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=77, projection_dim=16, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def decoder(channels: int = 4, **config: Any) -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=channels, sample_size=SIZE, scaling_factor=1.5,
        **config,
    ).eval()


def unet(width: int, **config: Any) -> diffusers.UNet2DConditionModel:
    return diffusers.UNet2DConditionModel(
        sample_size=SIZE, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        cross_attention_dim=width, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), **config,
    ).eval()  # fmt: skip


def scheduler(name: str, **config: Any) -> Any:
    if "FlowMatch" in name:
        return getattr(diffusers, name)(shift=3.0, **config)
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    clip = {"clip_sample": False} if name.startswith(("DDIM", "DDPM")) else {}
    return getattr(diffusers, name)(**betas, **clip, **config)


def unconditional(folder: Path, rule: Any, pipeline: str) -> Any:
    model = diffusers.UNet2DModel(
        sample_size=SIZE, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip
    return getattr(diffusers, pipeline)(model, rule)


def dit(folder: Path, rule: Any) -> Any:
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=SIZE,
        patch_size=2, num_embeds_ada_norm=1000, norm_num_groups=4,
    ).eval()  # fmt: skip
    return diffusers.DiTPipeline(model, decoder(), rule)


def stable_diffusion(folder: Path, rule: Any, pipeline: str = "StableDiffusionPipeline") -> Any:
    return getattr(diffusers, pipeline)(
        vae=decoder(), text_encoder=text_encoder(), tokenizer=tokenizer(folder), unet=unet(16), scheduler=rule,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def stable_diffusion_xl(folder: Path, rule: Any, pipeline: str = "StableDiffusionXLPipeline") -> Any:
    words = tokenizer(folder)
    model = unet(
        32, addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=64
    )
    return getattr(diffusers, pipeline)(
        vae=decoder(), text_encoder=text_encoder(), text_encoder_2=text_encoder(projection=True), tokenizer=words,
        tokenizer_2=words, unet=model, scheduler=rule, add_watermarker=False,
    )  # fmt: skip


def stable_diffusion_3(folder: Path, rule: Any, pipeline: str = "StableDiffusion3Pipeline") -> Any:
    words = tokenizer(folder)
    model = diffusers.SD3Transformer2DModel(
        sample_size=SIZE, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32, out_channels=4,
        pos_embed_max_size=8,
    ).eval()  # fmt: skip
    return getattr(diffusers, pipeline)(
        transformer=model, scheduler=rule, vae=decoder(shift_factor=0.06, use_quant_conv=False),
        text_encoder=text_encoder(projection=True), tokenizer=words, text_encoder_2=text_encoder(projection=True),
        tokenizer_2=words, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip


def flux(folder: Path, rule: Any, pipeline: str = "FluxPipeline") -> Any:
    """With a tokenizer of CLIP's kind for T5, too: the other kind cannot be written down here."""
    from transformers import T5Config, T5EncoderModel

    words = tokenizer(folder)
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, guidance_embeds=True, axes_dims_rope=(2, 4, 2),
    ).eval()  # fmt: skip
    second = T5EncoderModel(T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)).eval()
    return getattr(diffusers, pipeline)(
        scheduler=rule, vae=decoder(shift_factor=0.06), text_encoder=text_encoder(), tokenizer=words,
        text_encoder_2=second, tokenizer_2=words, transformer=model,
    )  # fmt: skip


BUILDERS: dict[str, Callable[..., Any]] = {
    "ddim": partial(unconditional, pipeline="DDIMPipeline"),
    "ddpm": partial(unconditional, pipeline="DDPMPipeline"),
    "dit": dit,
    "sd": stable_diffusion,
    "sd-img2img": partial(stable_diffusion, pipeline="StableDiffusionImg2ImgPipeline"),
    "sdxl": stable_diffusion_xl,
    "sdxl-img2img": partial(stable_diffusion_xl, pipeline="StableDiffusionXLImg2ImgPipeline"),
    "sd3": stable_diffusion_3,
    "sd3-img2img": partial(stable_diffusion_3, pipeline="StableDiffusion3Img2ImgPipeline"),
    "flux": flux,
    "flux-img2img": partial(flux, pipeline="FluxImg2ImgPipeline"),
}


def build(name: str, folder: Path, rule: str | None = None, **config: Any) -> Any:
    """A pipeline of BUILDERS, the same weights every time. rule: a scheduler's class name; config: its settings."""
    flow = name.startswith(("sd3", "flux"))
    chosen = scheduler(rule or ("FlowMatchEulerDiscreteScheduler" if flow else "DDIMScheduler"), **config)
    torch.manual_seed(0)
    pipe = BUILDERS[name](folder, chosen)
    with torch.no_grad():  # fresh weights hardly listen to their conditions
        for key, weight in (pipe.unet if hasattr(pipe, "unet") else pipe.transformer).named_parameters():
            weight.mul_(next((factor for part, factor in LOUDER.items() if part in key), 1))
    pipe.set_progress_bar_config(**QUIET)
    return pipe
