"""`deqdiff-fast sample`, on a tiny random network saved as a diffusers pipeline."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from cli_cases import SIZE, one_line
from PIL import Image

from deqdiff_fast.cli import _images, _run, main
from deqdiff_fast.integrations.diffusers import ddim_schedule, load_model


def test_sample_writes_a_grid(sample, tmp_path, capsys):
    assert sample("--out", "deep/er/x.png", "--solver", "quasi-newton") == 0
    picture = Image.open(tmp_path / "deep" / "er" / "x.png")
    assert picture.size == (2 * 96, 2 * 96)
    captured = capsys.readouterr()
    assert re.search(r"4 images, 10 timesteps, solver \S+, window \d+: \d+ rounds, \d+ model evaluations", captured.out)
    assert re.search(r"40/40.*round \d+/\d+, converged 4/4, residual \d", captured.err), "the progress bar"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep"]


def test_compare_serial_and_plot(sample, tmp_path, capsys):
    assert sample("--compare-serial", "--plot", "p.png", "--out", "x.png", "--solver", "picard", "--tol", "1e-3") == 0
    found = re.search(r"largest relative error (\S+), largest pixel difference (\d+)/255", capsys.readouterr().out)
    assert float(found[1]) < 1e-2
    assert int(found[2]) <= 2
    panels = np.asarray(Image.open(tmp_path / "x.png"))
    assert panels.shape == (192 + 20 + 16, 3 * 192 + 4 * 8, 3)
    serial, parallel, difference = (panels[28:-8, 8 + k * 200 : 200 + k * 200].astype(int) for k in range(3))
    assert abs(serial - parallel).max() == int(found[2])
    assert (difference == np.minimum(255, 16 * abs(serial - parallel))).all()
    assert Image.open(tmp_path / "p.png").size[0] > 500


def test_matches_diffusers_own_ddim(pipeline, tmp_path, monkeypatch):
    """What the command writes is what the diffusers pipeline draws from the same noise."""
    monkeypatch.chdir(tmp_path)
    assert (
        main(["sample", "--model", str(pipeline), "--steps", "10", "--batch", "1", "--seed", "3", "--tol", "1e-4"]) == 0
    )
    loaded = load_model(pipeline)
    problem = _run.Problem(
        loaded.model, ddim_schedule(loaded.scheduler, 10), loaded.info, 3, torch.device("cpu"), torch.float32
    )
    x, scheduler = problem.noise(1)[0], loaded.scheduler
    scheduler.set_timesteps(10)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(loaded.model(x, t).sample, t, x).prev_sample
    drawn = np.asarray(Image.open(tmp_path / "samples.png")).reshape(SIZE, 12, SIZE, 12, 3)[:, 0, :, 0]
    assert abs(drawn.astype(int) - _images.pixels(x)[0].numpy().astype(int)).max() <= 1


def test_seeds(sample, tmp_path):
    for name, options in {
        "a": ("--seed", "1"),
        "again": ("--seed", "1"),
        "other": ("--seed", "2"),
        "one": ("--seed", "1", "--batch", "1"),
        "noisy": ("--seed", "1", "--eta", "1"),
    }.items():
        assert sample("--out", f"{name}.png", "--tol", "1e-4", *options) == 0
    pixels = {path.stem: np.asarray(Image.open(path)).astype(int) for path in tmp_path.glob("*.png")}
    assert (pixels["a"] == pixels["again"]).all()
    assert abs(pixels["a"] - pixels["other"]).max() > 8
    assert abs(pixels["a"] - pixels["noisy"]).max() > 8
    assert abs(pixels["a"][:96, :96] - pixels["one"]).max() <= 1, "image k does not depend on the batch"


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace", "quad"])
def test_eta_and_spacings_equal_the_serial_chain(sample, capsys, spacing):
    assert sample("--eta", "0.5", "--spacing", spacing, "--compare-serial", "--window", "6", "--max-batch", "7") == 0
    assert float(re.search(r"relative error (\S+),", capsys.readouterr().out)[1]) <= 1e-2


def test_rounds_run_out_is_said(sample, capsys):
    assert sample("--solver", "quasi-newton", "--max-rounds", "2", "--compare-serial") == 0
    out = capsys.readouterr().out
    assert re.search(r"the rounds ran out and \d+ steps were finished serially", out)
    assert float(re.search(r"relative error (\S+),", out)[1]) < 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--steps", "0"), "--steps: expected a whole number >= 1, got '0'"),
        (("--steps", "1.5"), "expected a whole number"),
        (("--batch", "-1"), "expected a whole number"),
        (("--eta", "1.5"), "expected a number from 0 to 1"),
        (("--eta", "nan"), "expected a number from 0 to 1"),
        (("--tol", "0"), "expected a number > 0"),
        (("--tol", "small"), "expected a number, got 'small'"),
        (("--window", "0"), "expected a whole number"),
        (("--preset", "mnist"), "choose from"),
        (("--solver", "newton"), "choose from"),
        (("--nonsense",), "unrecognized arguments: --nonsense"),
    ],
)
def test_bad_options_are_refused_in_one_line(sample, capsys, options, message):
    with pytest.raises(SystemExit) as stop:
        sample(*options)
    assert stop.value.code == 2
    assert message in one_line(capsys)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--out", "x.jpg"), "name a file that ends in .png"),
        (("--out", "taken"), "name a file that ends in .png"),
        (("--out", "folder.png"), "that is a folder"),
        (("--plot", "x.svg"), "name a file that ends in .png"),
        (("--plot", "samples.png"), "name two files"),
        (("--out", "file/x.png"), "cannot write in file"),
        (("--out", "/proc/x.png"), "cannot write in /proc"),
        (("--device", "cuda:99"), "not usable here"),
        (("--device", "abacus"), "not usable here"),
    ],
)
def test_refused_before_the_model_is_loaded(sample, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.setattr(_run, "load_model", lambda *args, **kwargs: pytest.fail("work was done first"))
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("kept")
    assert sample(*options) == 2
    assert message in one_line(capsys)
    assert (tmp_path / "file").read_text() == "kept"


def test_a_failing_run_keeps_the_old_picture(sample, tmp_path, monkeypatch, capsys):
    assert sample("--out", "x.png") == 0
    before = (tmp_path / "x.png").read_bytes()
    capsys.readouterr()

    def broken(picture, path):
        path.write_bytes(b"half a pict")
        raise OSError("no space left on device")

    monkeypatch.setattr(Image.Image, "save", broken)
    assert sample("--out", "x.png", "--seed", "5") == 2
    assert "no space left on device" in capsys.readouterr().err
    assert (tmp_path / "x.png").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]


def test_interrupt(sample, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(_run, "load_model", interrupted)
    assert sample() == 130
    assert one_line(capsys) == "deqdiff-fast: interrupted"
