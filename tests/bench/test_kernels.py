"""Time and bytes of kernels, on a device and compiled ahead; the paper's form of a round computes the same."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path

import pytest
import torch

import deqdiff_fast as dq
from deqdiff_fast.kernels import available_backends

ROOT = Path(__file__).resolve().parents[2]


pytestmark = pytest.mark.skipif(not (ROOT / "bench" / "__main__.py").is_file(), reason="bench/ is not beside the tests")


EVERY_OP = {"ddim_update", "anderson_step", "newton_scan", "inverse_scan", "node_scan", "secant_fit"}
MIXTURE = ("--model", "mixture", "--size", "8", "--steps", "8")


def test_overhead(figures):
    report, table = figures("overhead", *MIXTURE, "--repeats", "2", "--solvers", "auto")
    row, *calls = report["rows"]
    assert len(row["runs"]) == 2
    assert "quasi-newton" in table
    measured = available_backends()["triton"] != "triton is not installed; install it with: pip install triton"
    assert ({call["op"] for call in calls} == EVERY_OP) == measured
    assert all(0 < run["model"] < run["seconds"] and 0 < run["share"] < 1 for run in row["runs"])


def test_kernels(figures):
    sides = ("copy", "reference", "eager", "eager-loop", "cpp")
    report, table = figures("kernels", "--shape", "2,6,40,3", "--passes", "2", "--sides", *sides)
    seen = {(row["op"], row["side"]) for row in report["rows"]}
    assert {(op, side) for op in ("ddim_update", "anderson_step") for side in sides[:4]} <= seen
    assert {("newton_scan", side) for side in sides[:2]} <= seen
    moved = {row["op"]: row["bytes_moved"] for row in report["rows"]}
    elements = 2 * 6 * 40
    expected = {"ddim_update": 12 * elements, "anderson_step": 44 * elements, "newton_scan": 44 * elements}
    expected |= {"inverse_scan": 44 * elements, "node_scan": 8 * elements, "secant_fit": 2 * 6 * 3 * 3 * 12}
    assert moved == expected
    for row in report["rows"]:
        assert len(row["passes"]) == 2
        assert row["side"] in table
        assert len(row.get("ratio_copy", [0, 0])) == 2


def test_compiled(figures, tmp_path):
    """One kernel; the bytes of every op against what the operands say, the launches against the kernels' own."""
    pytest.importorskip("triton", minversion="3.3")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("kernels are interpreted in this process, not compiled")
    file = tmp_path / "compiled.md"
    report, table = figures("compiled", "--select", "^copy_rows_kernel-fp32", "--results", file)
    parts = {part: [row for row in report["rows"] if row["part"] == part] for part in ("kernel", "bytes", "launches")}
    (kernel,) = parts["kernel"]
    assert 0 < kernel["registers"] <= 64
    assert kernel["spilled"] == 0
    assert kernel["loads"] >= 1
    assert kernel["warps"] <= kernel["resident"] <= 64
    for row in parts["bytes"]:
        assert row["floor_seconds"] == pytest.approx(row["bytes"] / 3.35e12)
        assert row["elements"] == sum(count for _, count in row["kernels"])
    rounds = {row["solver"]: row["triton"] for row in parts["launches"]}
    assert rounds["picard"]["ddim_update"] == 2
    assert rounds["triangular"]["anderson_step"] == 3
    assert rounds["quasi-newton"]["newton_scan"] == 3
    assert set(rounds["quasi-newton"]) == {"newton_scan", "mark_converged", "advance_window"}
    assert "nothing here was measured on a GPU" in table
    assert file.read_text(encoding="utf-8").strip() == table.strip()


LACKING = (
    "diffusers", "transformers", "accelerate", "k_diffusion", "deepinv", "torchvision", "matplotlib", "PIL", "scipy",
    "hypothesis",
)  # fmt: skip


def test_gpu(figures, baseline, tmp_path, monkeypatch):
    """On the CPU with tiny shapes: the same code that a device runs, the graphs apart; and with no more than the
    package's own dependencies, Triton and pytest, in this process and in the one of the tests."""
    for name in LACKING:
        monkeypatch.setitem(sys.modules, name, None)
    missing = tmp_path / "missing"
    missing.mkdir()
    (missing / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({LACKING}))\n")
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # theirs are not there either
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(missing), os.environ.get("PYTHONPATH")])))
    words = ("--shape", "2,6,40,3", "--passes", "1", "--models", "tiny", "--steps", "2", "3", "--repeats", "2")
    select = ("--select", "test_copy_rows and bad_arguments", "--compiler", "eager", "--compile-sample")
    report, table = figures("gpu", *words, *select, "--rows", "1", "3", "--out", tmp_path)
    parts = {part: [row for row in report["rows"] if row["part"] == part] for part in ("tests", "ops", "samples")}
    assert parts["tests"][0]["passed"] is True
    assert "1 passed" in parts["tests"][0]["said"]
    assert {row["op"] for row in parts["ops"]} == EVERY_OP
    for row in parts["ops"]:
        assert row["floor"] == pytest.approx(row["seconds"] * row["copy_rate"] / row["bytes_moved"])
    ways = {"serial, eager", "sample, eager", "sample, planned", "serial, compiled", "sample, compiled"}
    assert {(row["steps"], row["way"]) for row in parts["samples"]} == {(t, way) for t in (2, 3) for way in ways}
    for row in parts["samples"]:
        assert row["error"] <= 1e-2
        assert row["rounds"] <= row["steps"] or row["way"] == "sample, planned"
        assert row["way"] in table
    assert "goals are not judged" in table
    kept = (tmp_path / "cpu.md").read_text(encoding="utf-8")
    assert all(line in table for line in kept.splitlines()[1:])
    (costs,) = (row for row in report["rows"] if row["part"] == "costs")
    read = baseline._rank_prediction.read_costs(tmp_path / "cpu_tiny_costs.json")
    assert [read(int(rows)) for rows in costs["calls"]] == pytest.approx(list(costs["calls"].values()))
    assert json.loads((tmp_path / "cpu.json").read_text(encoding="utf-8"))["rows"] == report["rows"]


def test_the_parts_of_twelve_minutes(baseline):
    """Where a part is left out the others have its time; the last one ends in time."""
    deadlines = importlib.import_module("bench.gpu").deadlines
    every = ["costs", "tests", "ops", "tuning", "samples"]
    assert deadlines(every, 720) == {"tests": 180, "ops": 360, "samples": 600, "costs": 660, "tuning": 720}
    assert deadlines(["costs", "tests"], 240) == {"tests": 180, "costs": 240}


def test_the_plain_network_is_the_one_of_diffusers(baseline):
    """Of the benchmark's architectures, and the bundled weights."""
    diffusers = pytest.importorskip("diffusers")
    models = baseline._gpu_models
    x, t = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 900])
    with torch.no_grad():
        for config in models.ARCHITECTURES.values():
            theirs, own = diffusers.UNet2DModel(**config).eval(), models.PlainUNet(**config).eval()
            own.load_state_dict(theirs.state_dict())
            size = config["sample_size"]
            torch.testing.assert_close(own(x[..., :size, :size], t), theirs(x[..., :size, :size], t).sample)
        own, shape, kind, aids = models.load("bundled", "cpu")
        found = dq.integrations.diffusers.load_model("bundled")
        torch.testing.assert_close(own(x, t), found.model(x, t).sample, rtol=1e-4, atol=1e-5)
    assert (shape, kind) == (found.info.sample_shape, found.scheduler.config.prediction_type)
    assert set(aids) == {"spectrum", "draft"}


@pytest.mark.parametrize("loop", [False, True], ids=["cumsum", "loop"])
def test_the_papers_formulation_computes_the_same_round(baseline, loop):
    """Row 0 apart: the kernels take the plain step there, the paper mixes everywhere."""
    shape = baseline._operands.Shape(2, 12, 33, 3)
    inputs = baseline._operands.Inputs(shape, torch.float64, "cpu")
    fused, paper = baseline._operands.Fused(inputs, "reference"), baseline._operands.Paper(inputs, loop=loop)
    for k in range(5):
        fused.round, paper.round = k, k
        fused.predictions.copy_(inputs.predictions(k))
        paper.predictions.copy_(inputs.predictions(k))
        fused.anderson_step()
        residual, _ = paper.anderson_step()
        mixed = paper.solver.states().view(12, 2, 33)
        assert torch.allclose(mixed[1:], fused.states[2:], rtol=1e-6, atol=1e-8)
        if k == 0:
            assert residual == pytest.approx(float(fused.sums[0].sum().sqrt()), rel=1e-9)
            paper.solver.past.x[:, 1].view(12, 2, 33)[0] = fused.states[1]


@pytest.mark.parametrize("loop", [False, True], ids=["cumsum", "loop"])
def test_the_papers_chain_is_the_scan(baseline, loop):
    inputs = baseline._operands.Inputs(baseline._operands.Shape(2, 30, 17, 2), torch.float64, "cpu")
    fused, paper = baseline._operands.Fused(inputs, "reference"), baseline._operands.Paper(inputs, loop=loop)
    fused.ddim_update()
    paper.ddim_update()
    assert torch.allclose(paper.states, fused.states, rtol=1e-9, atol=1e-12)


def test_sides_take_turns(baseline):
    order = []
    sides = [
        baseline._timing.Side(name, lambda name=name: order.append(name), lambda name=name: order.append(f"{name}'"))
        for name in "ab"
    ]
    baseline._timing.interleave(sides, "cpu", passes=3, budget=1e-9, visit=0.0)
    warm, timed = order[:8], order[8:]
    assert warm == ["a'", "a"] * 2 + ["b'", "b"] * 2
    assert timed == ["a'", "a", "b'", "b", "b'", "b", "a'", "a", "a'", "a", "b'", "b"]
    assert [len(side.seconds) for side in sides] == [3, 3]
    assert baseline._timing.ratios(sides[0], sides[1]) == [
        a / b for a, b in zip(*(s.seconds for s in sides), strict=True)
    ]
