"""`deqdiff-fast sample --student`: one-step samples from a file."""

from __future__ import annotations

import pytest
import torch

from deqdiff_fast.cli import main
from deqdiff_fast.distillation import GET, GETSize

image = pytest.importorskip("PIL.Image")
SMALL = GETSize(width=16, injection_depth=1, equilibrium_depth=1, heads=2, equilibrium_ratio=2)


@pytest.fixture
def student(tmp_path):
    """Writes a student and returns its path."""

    def write(**settings):
        torch.manual_seed(0)
        model = GET((3, 8, 8), size=SMALL, **settings)
        torch.nn.init.normal_(model.last.weight, std=0.2)
        if model.label is not None:
            torch.nn.init.normal_(model.label.weight)
        model.save(tmp_path / "student.safetensors")
        return str(tmp_path / "student.safetensors")

    return write


def sample(path, tmp_path, *options):
    return main(["sample", "--student", path, "--out", str(tmp_path / "x.png"), "--device", "cpu", *options])


def test_it_draws_a_grid(student, tmp_path, capsys):
    path = student()
    assert sample(path, tmp_path, "--batch", "4") == 0
    assert "4 images in one step" in capsys.readouterr().out
    picture = image.open(tmp_path / "x.png")
    assert picture.size == (2 * 8 * 12, 2 * 8 * 12)
    first = picture.crop((0, 0, 96, 96)).tobytes()
    assert sample(path, tmp_path, "--batch", "1") == 0
    assert image.open(tmp_path / "x.png").tobytes() == first
    assert sample(path, tmp_path, "--batch", "1", "--seed", "1") == 0
    assert image.open(tmp_path / "x.png").tobytes() != first
    assert sample(path, tmp_path, "--equilibrium-steps", "1") == 0
    assert "left at a residual" in capsys.readouterr().out


def test_labels(student, tmp_path, capsys):
    path = student(classes=3)
    pictures = []
    for options in (["--label", "1"], ["--label", "2"], []):
        assert sample(path, tmp_path, "--batch", "1", *options) == 0
        pictures.append(image.open(tmp_path / "x.png").tobytes())
    assert len(set(pictures)) == 3
    capsys.readouterr()
    assert sample(path, tmp_path, "--label", "3") == 2
    assert "labels 0 to 2" in capsys.readouterr().err
    assert sample(student(), tmp_path, "--label", "0") == 2
    assert "has none" in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--steps", "10"], ["--compare-serial"], ["--window", "4"], ["--plot", "p.png"]])
def test_options_of_a_chain_are_refused(student, tmp_path, capsys, option):
    assert sample(student(), tmp_path, *option) == 2
    assert f"{option[0]}: a student has no chain" in capsys.readouterr().err


def test_files_that_are_none(student, tmp_path, capsys):
    assert sample(str(tmp_path / "none.safetensors"), tmp_path) == 2
    assert "none.safetensors" in capsys.readouterr().err
    assert main(["sample", "--label", "3"]) == 2
    assert "--student" in capsys.readouterr().err
