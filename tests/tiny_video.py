"""Tiny diffusers pipelines of video from pictures, and of sound, as those of tiny_families.py."""

from __future__ import annotations

from collections.abc import Callable

import diffusers
import torch
from tiny_conditioned import DDIM, SIZE, decoder, picture, prompts
from tiny_families import EULER, FLOW, LENGTH, Family, draw


def svd() -> Family:
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    model = diffusers.UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 32), layers_per_block=1, sample_size=SIZE, in_channels=8, out_channels=4,
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


def audioldm2() -> Family:
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        SpeechT5HifiGan,
        SpeechT5HifiGanConfig,
        T5Config,
        T5EncoderModel,
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


def animatediff() -> Family:
    from diffusers import MotionAdapter, UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        cross_attention_dim=16, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    motion = MotionAdapter(
        block_out_channels=(8, 16), motion_layers_per_block=1, motion_norm_num_groups=2, motion_num_attention_heads=4
    )
    given = prompts() | {"height": 64, "width": 64, "num_frames": 4, "guidance_scale": 3.0}
    return "AnimateDiffPipeline", "DDIMScheduler", {"unet": unet, "motion_adapter": motion}, given


FAMILIES: dict[str, Callable[[], Family]] = {
    "svd": svd, "audioldm2": audioldm2, "wan-image": wan_image, "cogvideox-image": cogvideox_image,
    "ltx-image": ltx_image, "animatediff": animatediff,
}  # fmt: skip
