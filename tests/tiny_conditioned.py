"""Tiny diffusers pipelines that are conditioned on pictures, as those of tiny_families.py."""

from __future__ import annotations

from collections.abc import Callable
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


def svd() -> Family:
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    model = diffusers.UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, sample_size=SIZE, in_channels=8, out_channels=4,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), cross_attention_dim=16,
        num_attention_heads=2, projection_class_embeddings_input_dim=24, addition_time_embed_dim=8,
    )  # fmt: skip
    encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(
        hidden_size=16, projection_dim=16, num_hidden_layers=1, num_attention_heads=2, image_size=8,
        intermediate_size=16, patch_size=4,
    ))  # fmt: skip
    vae = diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=(32,), down_block_types=("DownEncoderBlock2D",), latent_channels=4
    )
    parts = {"vae": vae, "image_encoder": encoder, "unet": model}
    parts["feature_extractor"] = CLIPImageProcessor(crop_size=8, size=8)
    given = {"image": picture(), "height": SIZE, "width": SIZE, "num_frames": 3}
    return "StableVideoDiffusionPipeline", EULER, parts, given


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
        if name.endswith("attn2.processor") or "attn2" in name:
            width = 16 if "mid_block" in name or "down_blocks.1" in name or "up_blocks.0" in name else 8
            keys |= {f"{number}.to_k_ip.weight": draw(width, 16, seed=number), f"{number}.to_v_ip.weight": draw(width, 16)}
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


def audioldm2() -> Family:
    from transformers import (
        GPT2Config, GPT2LMHeadModel, SpeechT5HifiGan, SpeechT5HifiGanConfig, T5Config, T5EncoderModel,
    )  # fmt: skip

    model = diffusers.AudioLDM2UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=8, sample_size=SIZE, in_channels=4,
        out_channels=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), cross_attention_dim=(16, 16),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=4,
    )  # fmt: skip
    vocoder = SpeechT5HifiGan(SpeechT5HifiGanConfig(
        model_in_dim=8, sampling_rate=16000, upsample_initial_channel=16, upsample_rates=[2, 2],
        upsample_kernel_sizes=[4, 4], resblock_kernel_sizes=[3, 7], resblock_dilation_sizes=[[1, 3], [1, 3]],
        normalize_before=False,
    ))  # fmt: skip
    given = prompts() | {"audio_length_in_s": 32 * 4 / 16000, "guidance_scale": 3.0}
    for name, seed in (("generated_prompt_embeds", 5), ("negative_generated_prompt_embeds", 6)):
        given[name] = draw(2, 4, 16, seed=seed)
    for name in ("attention_mask", "negative_attention_mask"):
        given[name] = torch.ones(2, LENGTH, dtype=torch.long)
    second = T5EncoderModel(T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    parts = {"vae": decoder(), "unet": model, "vocoder": vocoder, "text_encoder_2": second}
    parts["language_model"] = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2))
    return "AudioLDM2Pipeline", DDIM, parts, given


def wan_image() -> Family:
    vae = diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=36, out_channels=16, text_dim=16, freq_dim=16,
        ffn_dim=16, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    given = prompts() | {"image": picture(size=16, batch=1)[0], "height": 16, "width": 16, "num_frames": 5}
    given["prompt_embeds"], given["negative_prompt_embeds"] = draw(1, LENGTH, 16, seed=1), draw(1, LENGTH, 16, seed=2)
    parts = {"vae": vae, "transformer": model}
    return "WanImageToVideoPipeline", "UniPCMultistepScheduler", parts, given


def cogvideox_image() -> Family:
    vae = diffusers.AutoencoderKLCogVideoX(
        in_channels=3, out_channels=3, down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4, block_out_channels=(8, 8, 8, 8), latent_channels=4,
        layers_per_block=1, norm_num_groups=2, temporal_compression_ratio=4,
    )  # fmt: skip
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=8, out_channels=4, time_embed_dim=8,
        text_embed_dim=16, num_layers=2, sample_width=2, sample_height=2, sample_frames=9, patch_size=2,
        temporal_compression_ratio=4, max_text_seq_length=LENGTH, use_rotary_positional_embeddings=True,
        use_learned_positional_embeddings=True,
    )  # fmt: skip
    given = prompts() | {"image": picture(size=16, batch=1), "height": 16, "width": 16, "num_frames": 9}
    given["prompt_embeds"], given["negative_prompt_embeds"] = draw(1, LENGTH, 16, seed=1), draw(1, LENGTH, 16, seed=2)
    given["max_sequence_length"] = LENGTH
    parts = {"vae": vae, "transformer": model}
    return "CogVideoXImageToVideoPipeline", "CogVideoXDDIMScheduler", parts, given


def ltx_image() -> Family:
    vae = diffusers.AutoencoderKLLTXVideo(
        in_channels=3, out_channels=3, latent_channels=8, block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8), layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1), spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False), decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4, upsample_factor=(1,) * 4, timestep_conditioning=False, patch_size=1,
        patch_size_t=1, encoder_causal=True, decoder_causal=False,
    )  # fmt: skip
    model = diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, patch_size=1, patch_size_t=1, num_attention_heads=2, attention_head_dim=8,
        cross_attention_dim=16, num_layers=2, caption_channels=16,
    )  # fmt: skip
    given = {"image": picture(size=32), "height": 32, "width": 32, "num_frames": 9} | prompts()
    for name in ("prompt_attention_mask", "negative_prompt_attention_mask"):
        given[name] = torch.ones(2, LENGTH, dtype=torch.long)
    return "LTXImageToVideoPipeline", FLOW, {"vae": vae, "transformer": model}, given


FAMILIES: dict[str, Callable[[], Family]] = {
    "sd-inpaint": sd_inpaint, "sd-inpaint-plain": sd_inpaint_plain, "sd-controlnet": sd_controlnet,
    "sdxl-controlnet": sdxl_controlnet, "flux-kontext": flux_kontext, "flux-fill": flux_fill, "flux-inpaint": flux_inpaint,
    "flux-controlnet": flux_controlnet, "svd": svd, "marigold": marigold,
    "marigold-in-turn": marigold_in_turn, "sd-ip-adapter": sd_ip_adapter, "sd-perturbed": sd_perturbed,
    "sd3-skipped-layers": sd3_skipped_layers, "audioldm2": audioldm2, "wan-image": wan_image,
    "cogvideox-image": cogvideox_image, "ltx-image": ltx_image,
}  # fmt: skip
