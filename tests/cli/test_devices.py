"""`--devices N`: the command in N processes of torchrun, of which one speaks and writes."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from deqdiff_fast.cli import _devices, main
from deqdiff_fast.cli._output import CommandError


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4, add_attention=False,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    scheduler = diffusers.DDIMScheduler(prediction_type="v_prediction", clip_sample=False)
    diffusers.DDIMPipeline(unet, scheduler).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def command(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    whole = [sys.executable, "-m", "deqdiff_fast.cli", *words]
    return subprocess.run(whole, cwd=folder, env=env, capture_output=True, text=True, timeout=200, check=False)


def test_two_processes_sample_and_one_writes(model: Path, tmp_path: Path) -> None:
    words = ("sample", "--model", str(model), "--steps", "8", "--batch", "2", "--solver", "picard", "--tol", "1e-6")
    done = command(*words, "--devices", "2", "--compare-serial", "--out", "two.png", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 images, 8 timesteps") == 1
    assert done.stdout.count("wrote two.png") == 1
    assert (tmp_path / "two.png").is_file()
    error = float(done.stdout.partition("largest relative error ")[2].partition(",")[0])
    assert error < 1e-5


def test_two_processes_restore_what_one_restores(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "truth.png")
    words = ("restore", "truth.png", "--simulate", "--operator", "inpaint", "--model", str(model), "--steps", "12")
    words = (*words, "--eta", "0", "--tol", "1e-4")
    both = command(*words, "--devices", "2", "--out", "two", folder=tmp_path)
    assert both.returncode == 0, both.stderr
    assert both.stdout.count("1 image, sigma 0") == both.stdout.count("wrote measurement.png") == 1
    monkeypatch.chdir(tmp_path)
    assert main([*words, "--out", "one"]) == 0, capsys.readouterr().err
    found, expected = (np.asarray(Image.open(tmp_path / name / "restored.png")).astype(int) for name in ("two", "one"))
    assert np.abs(found - expected).max() <= 1
    assert not np.array_equal(found.astype(np.uint8), pixels)


def test_what_is_wrong_is_one_line(tmp_path: Path) -> None:
    done = command("invert", "nowhere.png", "--devices", "2", folder=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.strip().splitlines() == ["deqdiff-fast: error: nowhere.png: there is no such file"]


def test_the_first_process_has_time_to_speak(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher ends it as soon as another one has failed, with its message unsaid."""
    slept: list[float] = []
    monkeypatch.setattr(_devices.time, "sleep", slept.append)
    _devices.let_the_first_speak()
    for name, value in (("LOCAL_RANK", "0"), ("RANK", "0"), ("TORCHELASTIC_RUN_ID", "x")):
        monkeypatch.setenv(name, value)
    _devices.let_the_first_speak()
    assert not slept
    monkeypatch.setenv("RANK", "1")
    _devices.let_the_first_speak()
    assert slept == [_devices.PATIENCE]


def test_devices_of_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _devices.own_device("auto") == "auto"
    assert _devices.to_be_launched(argparse.Namespace(devices=2))
    assert not _devices.to_be_launched(argparse.Namespace(devices=1))
    for name, value in (("LOCAL_RANK", "1"), ("RANK", "5"), ("WORLD_SIZE", "8"), ("TORCHELASTIC_RUN_ID", "x")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert _devices.own_device("auto") == "cuda:1"
    assert _devices.own_device("cpu") == "cpu"
    assert not _devices.to_be_launched(argparse.Namespace(devices=8))
    assert _devices.group_of(argparse.Namespace(devices=1)) == "world"
    assert not _devices.writes()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(CommandError, match="--devices: there are 1 CUDA devices here"):
        _devices.own_device("auto")
