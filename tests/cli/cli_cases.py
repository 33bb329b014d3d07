"""A tiny network for the command line, and a check of its messages."""

from __future__ import annotations

from pathlib import Path

import torch

SIZE = 8


def tiny_unet(**changes):
    import diffusers

    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        **{
            "sample_size": SIZE, "layers_per_block": 1, "block_out_channels": (8, 16), "norm_num_groups": 4,
            "down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "add_attention": False,
        } | changes
    )  # fmt: skip


def save_pipeline(folder: Path) -> Path:
    """A tiny pipeline in the folder."""
    import diffusers

    scheduler = diffusers.DDIMScheduler(prediction_type="v_prediction", clip_sample=False)
    diffusers.DDIMPipeline(tiny_unet(), scheduler).save_pretrained(folder)
    return folder


def one_line(capsys) -> str:
    """The error message: one line, and nothing on standard output."""
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.strip().splitlines()
    return line
