"""`deqdiff-fast invert`, on the bundled model and pictures drawn here."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import deqdiff_fast as dq
from deqdiff_fast.cli import _images, main
from deqdiff_fast.integrations.diffusers import ddim_schedule, load_model


def draw(path, size=(32, 32), shift=0):
    """A soft disc over a slope of colours."""
    y, x = np.mgrid[0 : size[1], 0 : size[0]] / max(size)
    disc = 1 / (1 + np.exp(((x - 0.5) ** 2 + (y - 0.4) ** 2 - 0.05) * 60))
    picture = np.stack([0.4 + 0.4 * disc, 0.3 + 0.3 * y, np.roll(0.6 - 0.3 * x, shift, 1)], 2)
    Image.fromarray((255 * picture).astype(np.uint8)).save(path)
    return str(path)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_invert_writes_noise_that_gives_the_picture_back(folder, capsys):
    loaded = load_model("bundled")
    chain = dq.DEQSampler(loaded.model, ddim_schedule(loaded.scheduler, 12, eta=0.1))
    noise = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    sample = chain.serial(noise, generator=[torch.Generator().manual_seed(0)]).sample
    picture = str(folder / "a.png")  # in 8 bits: not quite the sample
    Image.fromarray(_images.pixels(sample)[0].numpy()).save(picture)
    assert main(["invert", picture, "--steps", "12", "--out", "deep/er", "--compare", "--eta", "0.1"]) == 0
    captured = capsys.readouterr()
    for name in ("auto", "equilibrium", "ddim", "fixed_point"):
        assert re.search(rf"{name}: 1 image, 12 timesteps: \d+ rounds, \d+ model evaluations", captured.out)
    assert re.search(r"ddim.*NOT within tolerance for 1 of 1", captured.out)
    assert "12/12" in captured.err, "the progress bar"
    files = sorted(path.name for path in (folder / "deep" / "er").iterdir())
    assert files == ["inversion.png", "inversion_error.png", "noise.safetensors"]
    stored = load_file("deep/er/noise.safetensors")
    again = chain.serial(stored["noise"], generator=[torch.Generator().manual_seed(0)]).sample
    assert _images.relative_error(again, stored["image"]).max() <= 1e-3
    original = torch.from_numpy(np.asarray(Image.open(picture))).permute(2, 0, 1)[None] / 127.5 - 1
    assert torch.allclose(stored["image"], original.float(), atol=1e-6)
    panels = np.asarray(Image.open("deep/er/inversion.png"))
    assert panels.shape == (96 + 20 + 16, 3 * 96 + 4 * 8, 3)
    assert abs(panels[28:-8, 8:104].astype(int) - panels[28:-8, 112:208].astype(int)).max() <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("nowhere.png",), "there is no such file"),
        ((".",), "that is a folder; name a file"),
        (("text.png",), "not a picture"),
        (("big.png",), "big.png: 40 x 20 pixels, and the model makes 32 x 32; pass --resize"),
        (("a.png", "--out", "text.png"), "that is a file; name a folder"),
        (("a.png", "--model", "./missing"), "there is no such folder"),
    ],
)
def test_what_cannot_be_inverted_is_one_line(folder, capsys, options, message):
    draw(folder / "a.png"), draw(folder / "big.png", (40, 20))
    (folder / "text.png").write_text("not a picture")
    assert main(["invert", *options, "--steps", "4"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert message in line


def test_resize(folder, capsys):
    pictures = [draw(folder / "a.png", (40, 20)), draw(folder / "b.png", shift=5)]
    assert main(["invert", *pictures, "--resize", "--steps", "4", "--method", "ddim"]) == 0
    assert load_file("inversion/noise.safetensors")["noise"].shape == (2, 3, 32, 32)
    assert "ddim: 2 images, 4 timesteps: 4 rounds, 8 model evaluations" in capsys.readouterr().out
