"""Students of a teacher, and pairs to train them on."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch

import deqdiff_fast as dq

ROOT = Path(__file__).resolve().parents[2]


pytestmark = pytest.mark.skipif(not (ROOT / "bench" / "__main__.py").is_file(), reason="bench/ is not beside the tests")


def test_students(figures, tmp_path):
    """Two of them trained for a moment; the errors are those of the samples, and the pairs are the teacher's."""
    make = dq.distillation.Pairs.make
    problem = importlib.import_module("bench._problems")
    schedule = dq.Schedule.ddim(problem.ABAR, dq.schedule.timesteps(1000, 6))
    make(problem.Mixture((3, 8, 8)), schedule, (3, 8, 8), 24, tmp_path / "pairs", method="serial", batch=8)
    given = ("--model", "mixture", "--size", "8", "--pairs", tmp_path / "pairs", "--held-out", "8", "--minutes", "0.01")
    ours = ("--out", tmp_path / "out", "--grid", tmp_path / "grid.png")
    report, table = figures("students", *given, "--steps", "6", *ours, "--train", "--width", "16", "--batch", "8")
    rows = {row["name"]: row for row in report["rows"]}
    assert rows["teacher, DDIM, 6 steps"]["error"] < 1e-4
    assert rows["teacher, DDIM, 4 steps"]["error"] < rows["teacher, DDIM, 1 steps"]["error"]
    sizes = [rows[f"{name}, training"]["parameters"] for name in ("GET", "transformer")]
    assert 0.7 < sizes[0] / sizes[1] < 1.4
    assert all(f"GET, {steps} equilibrium steps" in table for steps in (1, 32))
    assert (tmp_path / "grid.png").stat().st_size > 0
    with pytest.raises(AssertionError, match="--steps 5: the samples of these pairs are not of that chain"):
        figures("students", *given, "--steps", "5", *ours, "--train", "--width", "16", "--batch", "8")


def test_pairs(figures):
    turns = ("--turns", "2", "--pairs", "16", "--batches", "4", "8", "--clock", "cpu")
    report, table = figures("pairs", "--model", "mixture", "--size", "8", "--steps", "12", *turns)
    sides = [row["side"] for row in report["rows"]]
    assert sides[:2] == ["loop, batch 4", "loop, batch 8"]
    assert re.fullmatch(r"Pairs, (serial|rounds), batch \d+", sides[2])
    assert all(len(row["seconds"]) == 2 for row in report["rows"])
    assert "1.000" in table


def test_the_loop_makes_the_pairs(baseline, tmp_path):
    from bench._problems import Problem

    loaded = dq.integrations.diffusers.load_model("bundled")
    schedule = dq.integrations.diffusers.ddim_schedule(loaded.scheduler, 3)
    problem = Problem("bundled", loaded.model, None, loaded.info.sample_shape, "cpu")
    made = dq.distillation.Pairs.make(loaded.model, schedule, problem.shape, 2, tmp_path, method="serial", batch=2)
    found = importlib.import_module("bench.pairs")._loop(problem, schedule, 0, 0, 2)
    assert float((found - torch.stack([pair["sample"] for pair in made])).norm() / found.norm()) < 1e-5
