"""`--devices N`: the command in N processes of torchrun, of which one speaks and writes."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deqdiff_fast.cli import _devices
from deqdiff_fast.cli._output import CommandError


def command(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    whole = [sys.executable, "-m", "deqdiff_fast.cli", *words]
    return subprocess.run(whole, cwd=folder, env=env, capture_output=True, text=True, timeout=200, check=False)


def test_two_processes_sample_and_one_writes(pipeline: Path, tmp_path: Path) -> None:
    words = ("sample", "--model", str(pipeline), "--steps", "8", "--batch", "2", "--solver", "picard", "--tol", "1e-6")
    done = command(*words, "--devices", "2", "--compare-serial", "--out", "two.png", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 images, 8 timesteps") == 1
    assert done.stdout.count("wrote two.png") == 1
    assert (tmp_path / "two.png").is_file()
    error = float(done.stdout.partition("largest relative error ")[2].partition(",")[0])
    assert error < 1e-5


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
