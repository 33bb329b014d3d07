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
COVERED = {
    "plain_pytorch", "diffusion_policy", "train_cifar10", "invert_and_edit", "train_get", "own_chains", "own_models",
}  # fmt: skip
ELSEWHERE = {"pipeline": "integrations/test_pipelines.py", "app": "app/test_page.py", "app_solves": "app/conftest.py"}


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
    assert len(names) <= 10
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
    out = run("invert_and_edit", "--steps", 24, "--frames", 1, "--out", tmp_path / "walk.png")
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
    other = ["--channels", 16, 32, 32, "--betas", "squaredcos_cap_v2", "--prediction", "epsilon"]
    run("train_cifar10", tmp_path / "data.npz", "--steps", 1, *small, *other)
    config = (out / "pipeline" / "scheduler" / "scheduler_config.json").read_text()
    assert "squaredcos_cap_v2" in config
    assert "epsilon" in config


@pytest.mark.parametrize("labelled", [False, True])
def test_train_get(run, tmp_path, monkeypatch, labelled):
    image = pytest.importorskip("PIL.Image")
    from deqdiff_fast import distillation

    class FakePairs:
        """A teacher that turns its noise over, and colours it by the label."""

        def __init__(self, folder):
            assert folder == tmp_path / "pairs"

        def __len__(self):
            return 24

        def __getitem__(self, k):
            noise = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(k))
            label = torch.tensor(k % 3) if labelled else None
            sample = (k % 3 if labelled else 0) - noise
            return {"noise": noise, "sample": sample, "condition": label}

    monkeypatch.setattr(distillation, "Pairs", FakePairs, raising=False)
    out = tmp_path / "run"
    small = ["--out", out, "--width", 16, "--batch", 8, "--held-out", 8, "--threads", torch.get_num_threads()]
    small += ["--lr", 5e-3, "--ema", 0.9, "--save-every", 20]
    run("train_get", tmp_path / "pairs", "--steps", 40, *small)
    whole = torch.load(out / "checkpoint.pt")
    errors = list(whole["errors"].values())
    assert errors[-1] < errors[0]
    assert sum(whole["losses"][-5:]) < 0.8 * sum(whole["losses"][:5])
    assert image.open(out / "grid_000040.png").size == (8 * 3 * 8, 2 * 3 * 8)
    student = distillation.GET.load(out / "student.safetensors")
    assert student.classes == (3 if labelled else 0)


def test_train_get_goes_on_where_it_was(run, tmp_path, monkeypatch):
    pytest.importorskip("PIL.Image")
    from deqdiff_fast import distillation

    class FakePairs(torch.utils.data.TensorDataset):
        def __init__(self, folder):
            super().__init__(torch.randn(12, 1, 4, 4, generator=torch.Generator().manual_seed(0)))

        def __getitem__(self, k):
            noise = super().__getitem__(k)[0]
            return {"noise": noise, "sample": -noise, "condition": None}

    monkeypatch.setattr(distillation, "Pairs", FakePairs, raising=False)
    small = ["--width", 8, "--batch", 4, "--held-out", 4, "--steps", 6, "--threads", torch.get_num_threads()]
    small += ["--loss", "l2", "--no-bf16"]
    run("train_get", tmp_path, *small, "--out", tmp_path / "one", "--save-every", 3)
    checkpoint = tmp_path / "one" / "checkpoint.pt"
    whole = torch.load(checkpoint)

    saved = []
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, to: (saved.append(self.read_bytes()), replace(self, to))[1])
    run("train_get", tmp_path, *small, "--out", tmp_path / "two", "--save-every", 3)
    (tmp_path / "two" / "checkpoint.pt").write_bytes(saved[0])  # as after an interruption
    run("train_get", tmp_path, *small, "--out", tmp_path / "two", "--save-every", 3, "--resume")
    again = torch.load(tmp_path / "two" / "checkpoint.pt")
    assert torch.load(io.BytesIO(saved[0]))["step"] == 3
    assert again["losses"] == whole["losses"]
    for name in ("model", "average"):
        assert all(torch.equal(a, b) for a, b in zip(again[name].values(), whole[name].values()))
