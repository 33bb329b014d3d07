"""Every example runs, with small settings, and shows what it promises."""

from __future__ import annotations

import io
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
# Those with a test below, or in the file named.
COVERED = {"plain_pytorch", "diffusion_policy", "train_cifar10", "invert_and_edit", "own_chains", "own_models"}
ELSEWHERE = {"pipeline": "integrations/test_pipelines.py"}


@pytest.fixture
def run(capsys, monkeypatch):
    """An example's output, run as a script with the given arguments."""

    def run(name, *args):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, args)])
        threads, seed = torch.get_num_threads(), torch.random.get_rng_state()
        try:
            runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        finally:
            torch.set_num_threads(threads)
            torch.random.set_rng_state(seed)
        return capsys.readouterr().out

    return run


def test_every_example_is_tested():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names <= COVERED | set(ELSEWHERE)
    assert names >= COVERED
    assert len(names) <= 8
    for name in names & set(ELSEWHERE):
        text = (Path(__file__).parent / ELSEWHERE[name]).read_text(encoding="utf-8")
        assert f"{name}.py" in text


def test_plain_pytorch(run):
    out = run("plain_pytorch")
    rounds, error = re.search(r"parallel: (\d+) rounds, .* largest error (\S+)", out).groups()
    assert int(rounds) <= 15
    assert float(error) < 1e-2
    radii = [float(r) for r in re.search(r"radius: (.*) for labels", out).group(1).split(", ")]
    assert radii == pytest.approx([0.5, 1.5, 0.5, 1.5], abs=0.15)


@pytest.mark.parametrize(
    ("name", "cases"),
    [
        ("own_chains", ["flow_that_begins_at_0", "adams_bashforth", "clamped_to_0_1"]),
        ("own_models", ["masked", "no_label", "numpy_model", "side_inputs"]),
    ],
)
def test_models_and_chains_of_ones_own(run, name, cases):
    out = run(name)
    found = re.findall(r"^(\w+): 40 steps in (\d+) rounds, largest error (\S+)$", out, re.M)
    assert [case for case, *_ in found] == cases
    for _, rounds, error in found:
        assert int(rounds) <= 15
        assert float(error) < 1e-2


def test_diffusion_policy(run):
    out = run("diffusion_policy", "--training-steps", 60, "--repeats", 2)
    serial = re.search(r"^serial +\S+ +(\d+) +(\d+)$", out, re.M).groups()
    rounds, evals, error = re.search(r"^parallel +\S+ +(\d+) +(\d+) +(\S+)$", out, re.M).groups()
    assert serial == ("100", "100")
    assert int(rounds) <= 25
    assert 100 < int(evals) <= 100 * int(rounds)
    assert float(error) < 1e-2
    assert re.search(r"^parallel is [\d.]+ times as fast$", out, re.M)


def test_invert_and_edit(run, tmp_path):
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("diffusers")
    out = run("invert_and_edit", "--steps", 16, "--frames", 1, "--out", tmp_path / "walk.png")
    errors = [float(error) for error in re.search(r"round trip error: (.*)$", out, re.M).group(1).split(", ")]
    assert len(errors) == 2
    assert min(errors) <= 1e-3
    assert max(errors) <= 1e-3 or (max(errors) < 1e-2 and "tolerance" in out), "a miss must be said"
    assert image.open(tmp_path / "walk.png").size == (4 * 3 * 32, 4 * 32)


def test_train_cifar10(run, tmp_path):
    numpy, image = pytest.importorskip("numpy"), pytest.importorskip("PIL.Image")
    pytest.importorskip("diffusers")
    draw, packed, offset = numpy.random.default_rng(0), b"", [0]
    for _ in range(4):
        file = io.BytesIO()
        image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=numpy.uint8)).save(file, "JPEG")
        packed += file.getvalue()
        offset.append(len(packed))
    numpy.savez(tmp_path / "data.npz", jpeg=numpy.frombuffer(packed, dtype=numpy.uint8), offset=numpy.array(offset))
    out = tmp_path / "run"
    small = ["--out", out, "--batch", 2, "--save-every", 1, "--grid", 1, "--threads", torch.get_num_threads()]
    run("train_cifar10", tmp_path / "data.npz", "--steps", 1, *small)
    first = torch.load(out / "checkpoint.pt")
    run("train_cifar10", tmp_path / "data.npz", "--steps", 2, "--resume", *small)
    second = torch.load(out / "checkpoint.pt")
    assert (first["step"], second["step"]) == (1, 2)
    assert second["losses"][0] == first["losses"][0]
    assert any(not torch.equal(a, b) for a, b in zip(first["ema"].values(), second["ema"].values()))
    assert image.open(out / "grid_000002.png").size == (96, 96)
    assert (out / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors").is_file()
