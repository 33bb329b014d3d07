"""`deqdiff-fast restore`, on the bundled model and pictures drawn here."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from deqdiff_fast.cli import main
from deqdiff_fast.cli._quality import psnr, ssim


def draw(path, size=(32, 32)):
    """A soft disc over a slope of colours."""
    y, x = np.mgrid[0 : size[1], 0 : size[0]] / max(size)
    disc = 1 / (1 + np.exp(((x - 0.5) ** 2 + (y - 0.4) ** 2 - 0.05) * 60))
    picture = np.stack([0.4 + 0.4 * disc, 0.3 + 0.3 * y, 0.6 - 0.3 * x], 2)
    Image.fromarray((255 * picture).astype(np.uint8)).save(path)
    return str(path)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_restore_measures_and_restores(folder, capsys):
    picture = draw(folder / "a.png")
    words = ["restore", picture, "--operator", "sr2", "--steps", "8", "--eta", "0", "--out", "deep/er"]
    assert main([*words, "--simulate", "--sigma", "0.05"]) == 0
    printed = capsys.readouterr()
    assert "PSNR" in printed.out
    assert "ddnm" in printed.err  # the bar
    sizes = {name: Image.open(folder / "deep/er" / f"{name}.png").size for name in ("measurement", "restored", "truth")}
    assert sizes["restored"] == sizes["truth"]


def test_restore_of_a_measurement_alone(folder, capsys):
    small = draw(folder / "small.png", (8, 8))
    words = ["restore", small, "--operator", "sr4", "--steps", "6", "--method", "diffpir", "--serial"]
    assert main([*words, "--out", "found"]) == 0
    assert "PSNR" not in capsys.readouterr().out
    assert not (folder / "found" / "truth.png").exists()
    restored = np.asarray(Image.open(folder / "found" / "restored.png").resize((32, 32), Image.Resampling.NEAREST))
    blocks = restored.astype(float).reshape(8, 4, 8, 4, 3).mean((1, 3))
    assert np.abs(blocks - np.asarray(Image.open(small))).max() < 12  # values outside of [0, 255] are cut


def test_restore_at_temperature_zero_is_the_same_for_every_seed(folder):
    small, found = draw(folder / "small.png", (8, 8)), []
    words = [
        "restore",
        small,
        "--operator",
        "sr4",
        "--sigma",
        "0.05",
        "--steps",
        "4",
        "--method",
        "diffpir",
        "--serial",
    ]
    for temperature, seed in (("0", "1"), ("0", "2"), ("1", "2")):
        assert main([*words, "--temperature", temperature, "--seed", seed, "--out", "found"]) == 0
        found.append(np.asarray(Image.open(folder / "found" / "restored.png")).astype(int))
    assert np.array_equal(found[0], found[1])
    assert np.abs(found[2] - found[0]).max() > 2
    with pytest.raises(SystemExit):
        main([*words, "--temperature", "-1"])


def test_mistakes_are_one_line(folder, capsys):
    small = draw(folder / "small.png", (8, 8))
    for words, message in (
        (["--operator", "sr4", "--simulate", "--truth", small], "leave one of the two out"),
        (["--operator", "cs25"], "its measurements are no pictures"),
        (["--operator", "sr2"], "8 x 8 pixels, expected 16 x 16; scale it first"),
        (["--operator", "sr4", "--simulate", "--sigma", "auto"], "--sigma auto"),
        (["--operator", "blur", "--mask", small], "--mask: it is of inpaint; leave it out for blur"),
        (["--operator", "sr4", "--width", "1"], "--width: it is of blur and motion; leave it out for sr4"),
    ):
        assert main(["restore", small, "--steps", "4", *words]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["restore", small, "--operator", "sharpen"])
    assert "expected one of" in capsys.readouterr().err


def test_quality_of_what_is_known():
    truth = torch.linspace(-1, 1, 256).view(1, 1, 16, 16)
    assert float(psnr(truth + 0.2 * torch.ones(1), truth).item()) < 21
    assert float(psnr((0.5 * truth) + 0.1, 0.5 * truth).item()) == pytest.approx(10 * np.log10(4 / 0.01), rel=1e-5)
    assert float(ssim(truth, truth).item()) == pytest.approx(1.0)
    noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(0))
    assert float(ssim(truth + 0.5 * noise, truth).item()) < 0.9
