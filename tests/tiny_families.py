"""More diffusers pipelines, tiny, with random weights and conditions: without text encoders and, where the pipeline
does without one, without a decoder."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import diffusers
import torch

FLOW, DPM, EULER = "FlowMatchEulerDiscreteScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler"
# the pipeline's class, its scheduler's, its components (with a point: attributes), arguments of a call for two samples
Family = tuple[str, str, dict[str, Any], dict[str, Any]]
LENGTH = 6  # tokens


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 + seed))


def prompts(width: int, *, masks: bool = False, pooled: int = 0, batch: int = 2) -> dict[str, Any]:
    """Embeddings with and without a prompt, in the names that most pipelines have for them."""
    given: dict[str, Any] = {
        "prompt_embeds": draw(batch, LENGTH, width, seed=1),
        "negative_prompt_embeds": draw(batch, LENGTH, width, seed=2),
    }
    if masks:
        mask = torch.ones(batch, LENGTH, dtype=torch.long)
        mask[1, -1] = 0
        given |= {"prompt_attention_mask": mask, "negative_prompt_attention_mask": torch.ones_like(mask)}
    if pooled:
        given["pooled_prompt_embeds"] = draw(batch, pooled, seed=3)
        given["negative_pooled_prompt_embeds"] = draw(batch, pooled, seed=4)
    return given


def pixart() -> Family:
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, cross_attention_dim=16, sample_size=8,
        patch_size=2, norm_num_groups=4, caption_channels=16, use_additional_conditions=False, interpolation_scale=1,
    )  # fmt: skip
    given = prompts(16, masks=True) | {"negative_prompt": None, "use_resolution_binning": False, "guidance_scale": 3.0}
    return "PixArtSigmaPipeline", DPM, {"transformer": model}, given | {"height": 64, "width": 64}


def sana() -> Family:
    model = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=16,
        sample_size=8,
    )  # fmt: skip
    given = prompts(16, masks=True) | {"negative_prompt": None, "use_resolution_binning": False, "guidance_scale": 3.0}
    return "SanaPipeline", FLOW, {"transformer": model}, given | {"height": 256, "width": 256}


def lumina2() -> Family:
    model = diffusers.Lumina2Transformer2DModel(
        sample_size=8, in_channels=4, hidden_size=24, num_layers=1, num_refiner_layers=1, num_attention_heads=3,
        num_kv_heads=1, multiple_of=2, axes_dim_rope=(4, 2, 2), axes_lens=(64, 64, 64), cap_feat_dim=16,
    )  # fmt: skip
    return "Lumina2Pipeline", FLOW, {"transformer": model}, prompts(16, masks=True) | {"height": 64, "width": 64}


def aura_flow() -> Family:
    model = diffusers.AuraFlowTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=16, pos_embed_max_size=64,
    )  # fmt: skip
    return "AuraFlowPipeline", FLOW, {"transformer": model}, prompts(16, masks=True) | {"height": 64, "width": 64}


def hunyuan_dit() -> Family:
    model = diffusers.HunyuanDiT2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2, in_channels=4,
        cross_attention_dim=16, cross_attention_dim_t5=16, pooled_projection_dim=16, hidden_size=16, text_len=LENGTH,
        text_len_t5=LENGTH, activation_fn="gelu-approximate",
    )  # fmt: skip
    given = prompts(16, masks=True)
    given |= {f"{name}_2": value for name, value in given.items()}
    given |= {"use_resolution_binning": False, "height": 64, "width": 64, "guidance_rescale": 0.5}
    return "HunyuanDiTPipeline", DPM, {"transformer": model, "requires_safety_checker": False}, given


def kolors() -> Family:
    model = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        cross_attention_dim=16, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=64,
    )  # fmt: skip
    return "KolorsPipeline", EULER, {"unet": model}, prompts(16, pooled=16) | {"height": 64, "width": 64}


def cogview4() -> Family:
    model = diffusers.CogView4Transformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        text_embed_dim=16, time_embed_dim=8, condition_dim=4, pos_embed_max_size=16, sample_size=8,
        rope_axes_dim=(8, 8),
    )  # fmt: skip
    return "CogView4Pipeline", FLOW, {"transformer": model}, prompts(16) | {"height": 64, "width": 64}


def qwen_image() -> Family:
    model = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    given = prompts(16) | {"height": 64, "width": 64, "true_cfg_scale": 3.0}
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    given |= {"prompt_embeds_mask": mask, "negative_prompt_embeds_mask": mask}
    return "QwenImagePipeline", FLOW, {"transformer": model}, given


def chroma() -> Family:
    model = diffusers.ChromaTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(4, 4, 8), approximator_hidden_dim=16, approximator_layers=1,
        approximator_num_channels=16,
    )  # fmt: skip
    given = prompts(16, masks=True)
    given |= {name: value.bool() for name, value in given.items() if "mask" in name}
    return "ChromaPipeline", FLOW, {"transformer": model}, given | {"height": 64, "width": 64}


def ltx() -> Family:
    model = diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, patch_size=1, patch_size_t=1, num_attention_heads=2, attention_head_dim=8,
        cross_attention_dim=16, num_layers=2, caption_channels=16,
    )  # fmt: skip
    given = prompts(16, masks=True) | {"height": 64, "width": 64, "num_frames": 9, "guidance_rescale": 0.3}
    return "LTXPipeline", FLOW, {"transformer": model}, given


def cogvideox() -> Family:
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=16, num_layers=2, sample_width=8, sample_height=8, sample_frames=9, patch_size=2,
        max_text_seq_length=LENGTH, use_rotary_positional_embeddings=True,
    )  # fmt: skip
    given = prompts(16) | {"height": 64, "width": 64, "num_frames": 9, "max_sequence_length": LENGTH}
    return "CogVideoXPipeline", "CogVideoXDDIMScheduler", {"transformer": model}, given


def wan_transformer(channels: int = 4, **further: Any) -> Any:
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=channels, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=16, num_layers=2, rope_max_seq_len=32, **further,
    )  # fmt: skip


def wan() -> Family:
    given = prompts(16) | {"height": 64, "width": 64, "num_frames": 5}
    parts = {"transformer": wan_transformer()}
    return "WanPipeline", "UniPCMultistepScheduler", parts, given


def wan22() -> Family:
    kind, rule, parts, given = wan()
    parts |= {"transformer_2": wan_transformer(), "boundary_ratio": 0.6}
    return kind, rule, parts, given | {"guidance_scale_2": 2.0}


def hunyuan_video() -> Family:
    if diffusers.__version__ < "0.33":
        raise ImportError("HunyuanVideo of diffusers 0.32 takes its masks, one a sample, for one a head")
    model = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=1, patch_size_t=1, guidance_embeds=True, text_embed_dim=16,
        pooled_projection_dim=8, rope_axes_dim=(2, 4, 4),
    )  # fmt: skip
    given = prompts(16, masks=True, pooled=8) | {"height": 64, "width": 64, "num_frames": 5, "true_cfg_scale": 3.0}
    return "HunyuanVideoPipeline", FLOW, {"transformer": model}, given


def mochi() -> Family:
    model = diffusers.MochiTransformer3DModel(
        patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=16,
        in_channels=4, text_embed_dim=16, time_embed_dim=4, max_sequence_length=LENGTH,
    )  # fmt: skip
    given = prompts(16, masks=True) | {"height": 64, "width": 64, "num_frames": 7}
    given["prompt_attention_mask"], given["negative_prompt_attention_mask"] = (
        given[name].bool() for name in ("prompt_attention_mask", "negative_prompt_attention_mask")
    )
    return "MochiPipeline", FLOW, {"transformer": model}, given


def stable_audio() -> Family:
    from diffusers.pipelines.stable_audio import StableAudioProjectionModel

    model = diffusers.StableAudioDiTModel(
        sample_size=16, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        num_key_value_attention_heads=2, out_channels=4, cross_attention_dim=16, time_proj_dim=8,
        global_states_input_dim=32, cross_attention_input_dim=16,
    )  # fmt: skip
    vae = diffusers.AutoencoderOobleck(
        encoder_hidden_size=6, downsampling_ratios=[1, 2], decoder_channels=3, decoder_input_channels=4,
        audio_channels=2, channel_multiples=[2, 4], sampling_rate=4,
    )  # fmt: skip
    project = StableAudioProjectionModel(text_encoder_dim=16, conditioning_dim=16, min_value=0, max_value=32)
    given = prompts(16) | {"audio_end_in_s": 4.0, "guidance_scale": 3.0}
    given |= {"attention_mask": torch.ones(2, LENGTH, dtype=torch.long)}
    given |= {"negative_attention_mask": torch.ones(2, LENGTH, dtype=torch.long)}
    parts = {"transformer": model, "vae": vae, "projection_model": project}
    return "StableAudioPipeline", "EDMDPMSolverMultistepScheduler", parts, given


class Undecoded(torch.nn.Module):
    """In the place of a decoder for latents, where diffusers before 0.33 asks it for sizes: the usual ones."""

    config = SimpleNamespace(block_out_channels=(1, 1, 1, 1), scaling_factor=1.0)
    spatial_compression_ratio, temporal_compression_ratio, dtype = 32, 8, torch.float32
    device = torch.device("cpu")


class Tokenizer:
    """In the place of one that diffusers before 0.33 turns to the right side, whatever it is given."""

    padding_side = "right"


STAND_INS: dict[str, dict[str, Any]] = {
    **{kind: {"vae": Undecoded()} for kind in ("PixArtSigmaPipeline", "LTXPipeline", "AnimateDiffPipeline")},
    "SanaPipeline": {"tokenizer": Tokenizer()},
}


def assemble(kind: str, parts: dict[str, Any], rule: Any) -> Any:
    """The pipeline, without what is not among `parts`."""
    pipeline = getattr(diffusers, kind)
    wanted = list(inspect.signature(pipeline.__init__).parameters.items())[1:]
    given = {name: None for name, p in wanted if p.default is p.empty} | parts | {"scheduler": rule}
    given = {name: value for name, value in given.items() if not name.startswith(".")}
    if diffusers.__version__ < "0.33" and kind in STAND_INS:
        given |= STAND_INS[kind]
    pipe = pipeline(**given)
    for name, value in parts.items():
        if name.startswith("."):
            setattr(pipe, name[1:], value)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    return pipe


FAMILIES: dict[str, Callable[[], Family]] = {
    "pixart-sigma": pixart, "sana": sana, "lumina2": lumina2, "auraflow": aura_flow, "hunyuan-dit": hunyuan_dit,
    "kolors": kolors, "cogview4": cogview4, "qwen-image": qwen_image, "chroma": chroma, "ltx": ltx,
    "cogvideox": cogvideox, "wan": wan, "wan2.2": wan22, "hunyuan-video": hunyuan_video, "mochi": mochi,
    "stable-audio": stable_audio,
}  # fmt: skip
