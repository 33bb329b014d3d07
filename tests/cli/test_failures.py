"""Whatever a user can do wrong is one line and an exit status, and what was finished is kept."""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from deqdiff_fast.cli import _invert, _run, main
from deqdiff_fast.integrations.diffusers import load_model

SIZE = 8


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "pipeline"
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=SIZE, layers_per_block=1, block_out_channels=(4, 8), norm_num_groups=4, add_attention=False,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture
def run(pipeline, tmp_path, monkeypatch):
    """Run a command on the tiny model in an empty folder, with a few steps."""
    monkeypatch.chdir(tmp_path)

    def run(command: str, *options: str) -> int:
        count = {"sample": ("--batch", "1"), "invert": ("--method", "ddim"), "demo": ()}[command]
        return main([command, "--model", str(pipeline), "--steps", "3", *count, *options])

    return run


@pytest.fixture
def unloaded(monkeypatch):
    """The model may not be loaded."""
    monkeypatch.setattr(_run, "load_model", lambda *args, **kwargs: pytest.fail("work was done first"))


def last_line(capsys) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


def draw(name: str) -> None:
    draw = np.random.default_rng(len(name))
    Image.fromarray(draw.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(name)


def test_bad_images_do_not_lose_the_batch(run, tmp_path, capsys):
    names = [f"{'x' * k}.png" for k in range(1, 11)]
    for name in names:
        draw(name)
    Path(names[3]).write_text("hello")
    Path(names[6]).unlink()
    Image.new("RGB", (5, 5)).save(names[8])
    assert run("invert", *names) == 1
    line = last_line(capsys)
    assert line.startswith("deqdiff-fast: error: inverted 7 of 10 pictures; left out xxxx.png: not a picture")
    assert "xxxxxxx.png: there is no such file; xxxxxxxxx.png: 5 x 5 pixels" in line
    stored = load_file("inversion/noise.safetensors")
    kept = [name for k, name in enumerate(names) if k not in (3, 6, 8)]
    for image, name in zip(stored["image"], kept, strict=True):
        pixels = torch.from_numpy(np.array(Image.open(name))).permute(2, 0, 1)
        assert torch.allclose(image, pixels / 127.5 - 1, atol=1e-6)
    with safe_open("inversion/noise.safetensors", "pt") as file:
        assert json.loads(file.metadata()["images"]) == kept
    assert run("invert", names[3], names[6]) == 2
    assert "xxxx.png: not a picture" in last_line(capsys)


def test_the_result_is_written_before_it_is_compared(run, tmp_path, monkeypatch, capsys):
    draw("a.png")
    invert = _invert.invert

    def failing(problem, image, method, args):
        if method == "equilibrium":
            raise RuntimeError("a kernel has failed\nwith a long story")
        return invert(problem, image, method, args)

    monkeypatch.setattr(_invert, "invert", failing)
    assert run("invert", "a.png", "--compare") == 1
    assert last_line(capsys) == "deqdiff-fast: error: RuntimeError: a kernel has failed (--debug shows where)"
    assert Path("inversion/noise.safetensors").is_file()


@pytest.mark.parametrize("error", [RuntimeError("it broke"), MemoryError(), torch.OutOfMemoryError("x"), KeyError("k")])
def test_work_that_fails_is_one_line_and_status_1(run, monkeypatch, capsys, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(_run, "load_model", fail)
    assert run("sample") == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"deqdiff-fast: error: {type(error).__name__}: ")


@pytest.mark.parametrize("count", [10**9, 10**20])
def test_a_batch_that_cannot_be(run, capsys, count):
    assert run("sample", "--batch", str(count)) == 2
    assert f"a batch of {count} images: their noise alone takes" in last_line(capsys)
    assert run("demo", "--images", str(count)) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("sample", "--device", "meta"), "--device meta: not usable here"),
        (("sample", "--device", "privateuseone"), "not usable here"),
        (("sample", "--device", ""), "not usable here"),
        (("sample", "--out", "x" * 260 + ".png"), "name another file"),
        (("invert", "a.png", "--out", "taken"), "taken/noise.safetensors: that is a folder"),
        (("demo", "--out", "taken"), "taken/results.md: that is a folder"),
        (("invert", "a.png", "--out", "a.png/deep"), "cannot write in a.png"),
    ],
)
def test_refused_before_the_model_is_loaded(run, unloaded, capsys, options, message):
    draw("a.png")
    for name in ("noise.safetensors", "results.md"):
        Path("taken", name).mkdir(parents=True)
    assert run(*options) == 2
    assert message in last_line(capsys)


@pytest.mark.parametrize(
    ("library", "options", "message"),
    [
        ("matplotlib", ("sample", "--plot", "p.png"), 'pip install "deqdiff_fast[plot]"'),
        ("matplotlib", ("invert", "a.png", "--compare"), 'pip install "deqdiff_fast[plot]"'),
        ("matplotlib", ("demo",), 'pip install "deqdiff_fast[plot]"'),
        ("PIL", ("sample",), 'pip install "deqdiff_fast[diffusers]"'),
        ("PIL", ("invert", "a.png"), 'pip install "deqdiff_fast[diffusers]"'),
    ],
)
def test_libraries_that_are_missing_are_named_first(run, unloaded, monkeypatch, capsys, library, options, message):
    draw("a.png")
    load = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == library:
            raise ImportError(f"No module named {library!r}")
        return load(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert run(*options) == 2
    assert message in last_line(capsys)


@pytest.mark.parametrize(("option", "value"), [("--seed", "9" * 20), ("--seed", "one"), ("--tol", "1e300")])
def test_numbers_that_overflow(run, capsys, option, value):
    with pytest.raises(SystemExit) as stop:
        run("sample", option, value)
    assert stop.value.code == 2
    assert value in last_line(capsys)


@pytest.mark.parametrize("options", [("sample", "--out", "out/x.png"), ("invert", "a.png", "--out", "out")])
def test_a_full_disk_leaves_no_half_file(run, monkeypatch, capsys, options):
    draw("a.png")
    assert run(*options) == 0
    before = {path.name: path.read_bytes() for path in Path("out").iterdir()}

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert run(*options, "--seed", "3") == 2
    assert "not written (No space left on device)" in last_line(capsys)
    assert {path.name: path.read_bytes() for path in Path("out").iterdir()} == before


def test_names_that_are_long_or_odd(run, capsys):
    assert run("sample", "--out", "x" * 250 + ".png") == 0
    odd = os.fsdecode(b"\xff$_{.png")
    assert run("sample", "--out", odd, "--plot", "p.png", "--solver", "picard") == 0
    draw(odd)
    assert run("invert", odd, "--out", os.fsdecode(b"\xfe")) == 0
    assert os.fsencode("x" * 250 + ".png") in os.listdir(b".")


def test_a_model_with_an_odd_name_is_in_the_plots_title(run, pipeline, tmp_path):
    (tmp_path / "a$b_{c$").symlink_to(pipeline)
    assert run("sample", "--model", "a$b_{c$", "--plot", "p.png", "--solver", "picard") == 0
    assert Path("p.png").is_file()


def test_what_is_printed_is_lost(run, monkeypatch, capsys):
    class Full(io.StringIO):
        def flush(self) -> None:
            if self.getvalue():
                raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Full())
    assert run("sample") == 1
    assert "standard output: No space left on device" in last_line(capsys)
    monkeypatch.setattr(sys, "stdout", None)
    assert run("sample") == 0


def test_a_home_that_is_not_there():
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        load_model("~nobody-of-this-name/model")
