"""`deqdiff-fast pairs`: a folder that goes on where it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import deqdiff_fast as dq
from deqdiff_fast.cli import main
from deqdiff_fast.distillation import Pairs

diffusers = pytest.importorskip("diffusers")
SMALL = {
    "sample_size": 8, "layers_per_block": 1, "block_out_channels": (8, 16), "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "UpBlock2D"),
}  # fmt: skip


def model(folder: Path, **settings) -> str:
    """A tiny model with random weights and its scheduler."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = diffusers.UNet2DModel(**SMALL, **settings)
    unet.save_pretrained(folder / "unet")
    diffusers.DDIMScheduler(num_train_timesteps=100, clip_sample=False).save_pretrained(folder / "scheduler")
    return str(folder)


def test_pairs_are_made_and_go_on(tmp_path, capsys):
    name, out = model(tmp_path / "model"), tmp_path / "pairs"
    arguments = ["pairs", name, "--out", str(out), "--steps", "5", "--device", "cpu", "--count"]
    assert main([*arguments, "20", "--batch", "8", "--method", "serial"]) == 0
    told = capsys.readouterr()
    assert f"20 pairs of 5 timesteps, by the plain chain, 8 at a time, in {out}" in told.out
    assert "pair/s" in told.err
    assert main([*arguments, "70"]) == 0
    pairs = Pairs(out)
    assert len(pairs) == 70
    loaded = dq.integrations.diffusers.load_model(name)
    schedule = dq.integrations.diffusers.ddim_schedule(loaded.scheduler, 5)
    exact = dq.DEQSampler(loaded.model, schedule).serial(pairs[69]["noise"][None]).sample[0]
    assert float((pairs[69]["sample"] - exact).norm() / exact.norm()) < 1e-4


def test_a_changed_model_and_a_folder_that_cannot_be_are_one_line(tmp_path, capsys):
    name, out = model(tmp_path / "model"), tmp_path / "pairs"
    arguments = ["pairs", name, "--out", str(out), "--steps", "5", "--device", "cpu", "--count", "4", "--batch", "4"]
    assert main(arguments) == 0
    model(tmp_path / "model", act_fn="gelu")  # other answers, the same weights
    assert main(arguments) == 2
    assert "error: " + str(out) in (told := capsys.readouterr().err)
    assert "made with another model" in told
    (tmp_path / "file").write_text("")
    assert main(["pairs", name, "--out", str(tmp_path / "file"), "--count", "4"]) == 2
    assert "cannot write in" in capsys.readouterr().err


def test_classes_are_conditions(tmp_path):
    name, out = model(tmp_path / "model", num_class_embeds=3), tmp_path / "pairs"
    assert main(["pairs", name, "--out", str(out), "--steps", "4", "--device", "cpu", "--count", "8"]) == 0
    assert [int(pair["condition"]) for pair in Pairs(out)] == [0, 1, 2, 0, 1, 2, 0, 1]
