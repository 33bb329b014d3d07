"""A tiny pipeline for the page of examples/app.py, and solves that are none."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


SIZE, STEPS = 8, 6


def save_pipeline(folder: Path, **config) -> str:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=SIZE, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, add_attention=False, **config,
    )  # fmt: skip
    scheduler = diffusers.DDIMScheduler(prediction_type="v_prediction", clip_sample=False)
    diffusers.DDIMPipeline(unet, scheduler).save_pretrained(folder)
    return str(folder)


def round_info(round, final=0, residual=1.0, steps=9):
    return SimpleNamespace(
        round=round, num_steps=steps, front=torch.tensor([final]), residual=torch.tensor([residual]),
        sample=lambda: torch.full((1, 1, 2, 2), float(round)),
    )  # fmt: skip


def rounds_of(count, callback, before=lambda: None):
    """A solve of so many rounds, stopped by its callback; returns how many it made."""
    for round in range(1, count + 1):
        before()
        if callback(round_info(round, final=9 if round == count else 0)):
            return round
    return count


def watch(app, solve, stop=None, every=1):
    return app.Watched(solve, stop or threading.Event(), lambda info: info.sample(), every)
