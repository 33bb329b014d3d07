"""Folders of models that are damaged, of another model or of another version: a ValueError that names the file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

import deqdiff_fast as dq
from deqdiff_fast.integrations.diffusers import ddim_schedule, load_model

WEIGHTS, CONFIG = "unet/diffusion_pytorch_model.safetensors", "unet/config.json"
RULES, SPECTRUM, DRAFT = "scheduler/scheduler_config.json", "spectrum.safetensors", "draft.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "pipeline"
    unet = diffusers.UNet2DModel(
        sample_size=8, layers_per_block=1, block_out_channels=(4, 8), norm_num_groups=4, add_attention=False,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler()).save_pretrained(folder)
    beside(folder)
    return folder


def beside(folder: Path, size: int = 8, timesteps: int = 1000, prediction: str = "epsilon") -> None:
    """Write a spectrum and a draft."""
    spectrum = dq.SpectralSlope(torch.ones(3, size, size), torch.eye(3))
    spectrum.save(folder / SPECTRUM)
    dq.ConvDraft(torch.linspace(0.99, 0.01, timesteps), prediction, spectrum, 8, 1).save(folder / DRAFT)


def configured(name: str, **changes):
    def change(folder: Path) -> None:
        config = json.loads((folder / name).read_text(encoding="utf-8"))
        (folder / name).write_text(json.dumps(config | changes), encoding="utf-8")

    return change


def without_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({name: value for name, value in tensors.items() if name != "conv_in.bias"}, folder / WEIGHTS)


def only_draft(**changes):
    def change(folder: Path) -> None:
        beside(folder, **changes)
        (folder / SPECTRUM).unlink()

    return change


CHANGES = {
    "weights cut": (WEIGHTS, lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]), "UNet2DModel"),
    "weights text": (WEIGHTS, lambda f: (f / WEIGHTS).write_text("hello"), "UNet2DModel"),
    "weights foreign": (WEIGHTS, lambda f: save_file({"x": torch.ones(2)}, f / WEIGHTS), "tensors are missing"),
    "one is missing": (WEIGHTS, without_a_tensor, "1 tensors are missing, such as conv_in.bias"),
    "other sizes": (WEIGHTS, configured(CONFIG, block_out_channels=(8, 8)), "size mismatch"),
    "config text": (CONFIG, lambda f: (f / CONFIG).write_text("hello"), "not a valid JSON"),
    "config list": (CONFIG, lambda f: (f / CONFIG).write_text("[]"), "class of a model"),
    "a module": (CONFIG, configured(CONFIG, _class_name="logging"), "class of a model"),
    "no model": (CONFIG, configured(CONFIG, _class_name="DDIMScheduler"), "class of a model"),
    "no size": (CONFIG, configured(CONFIG, sample_size=None), "sample_size"),
    "rules text": (RULES, lambda f: (f / RULES).write_bytes(b"\xff\0"), "not a valid JSON"),
    "no scheduler": (RULES, configured(RULES, _class_name="UNet2DModel"), "class of a scheduler"),
    "other rules": (RULES, configured(RULES, num_train_timesteps="many"), "scheduler that diffusers can use"),
    "spectrum text": (SPECTRUM, lambda f: (f / SPECTRUM).write_text("hello"), r"SpectralSlope\.save"),
    "spectrum of others": (SPECTRUM, lambda f: beside(f, size=4), r"shape \(3, 8, 8\), got \(3, 4, 4\)"),
    "draft text": (DRAFT, lambda f: (f / DRAFT).write_text("hello"), r"ConvDraft\.save"),
    "draft of others": (DRAFT, only_draft(size=4), r"got \(\(3, 4, 4\), 1000, 'epsilon'\)"),
    "draft too short": (DRAFT, only_draft(timesteps=10), r"got \(\(3, 8, 8\), 10, 'epsilon'\)"),
    "draft predicts": (DRAFT, only_draft(prediction="sample"), r"got \(\(3, 8, 8\), 1000, 'sample'\)"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_it_is_refused_by_name(whole, tmp_path, kind):
    name, change, message = CHANGES[kind]
    folder = tmp_path / "model"
    shutil.copytree(whole, folder)
    change(folder)
    with pytest.raises(ValueError, match=rf"(?s){Path(name).name}: expected .*{message}"):
        load_model(folder)


def test_what_is_not_there_stays_an_os_error(whole, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(whole, folder)
    assert load_model(folder).draft is not None
    (folder / WEIGHTS).unlink()
    with pytest.raises(OSError, match="found in directory"):
        load_model(folder)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("TCDScheduler", {}),
        ("CogVideoXDDIMScheduler", {"snr_shift_scale": 1.0}),
        ("UnCLIPScheduler", {}),
        ("PNDMScheduler", {}),
        ("DDPMScheduler", {"beta_schedule": "sigmoid"}),
        ("DDPMScheduler", {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}),
    ],
)
def test_ddim_has_the_noise_levels_of_the_scheduler(name, settings):
    given = getattr(diffusers, name)(**settings)
    schedule = ddim_schedule(given, 10, spacing="leading")
    expected = given.alphas_cumprod[schedule.timesteps.long()].sqrt().double()
    assert torch.allclose(schedule.signal[:-1], expected, atol=1e-6)
    assert (schedule.clip is not None) == bool(given.config.get("clip_sample"))
