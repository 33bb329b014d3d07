"""The planner's and the pipelines' benchmarks, and what the command line of all refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


pytestmark = pytest.mark.skipif(not (ROOT / "bench" / "__main__.py").is_file(), reason="bench/ is not beside the tests")


MIXTURE = ("--model", "mixture", "--size", "8", "--steps", "8")


def test_planner(figures):
    small = ("--steps", "8", "--batches", "1", "2", "--size", "8", "--fit", "5", "--passes", "3", "--budget", "9")
    report, table = figures("planner", "--problems", "mixture", "policy", "--plans", "--noises", "2", *small)
    assert {(row["problem"], row["batch"]) for row in report["rows"]} == {
        (problem, batch) for problem in ("mixture", "policy") for batch in (1, 2)
    }
    assert table.count("model evaluations") > 4 * 2
    for row in report["rows"]:
        assert len(row["ratios"]) == len(row["loop_seconds"]) == len(row["sample_seconds"]) == 3 * 2
        pairs = zip(row["ratios"], row["loop_seconds"], row["sample_seconds"], strict=True)
        assert all(ratio == pytest.approx(loop / sample) for ratio, loop, sample in pairs)
        assert row["loop_error"] < 1e-4, "the author's loop is the same chain"
        assert row["error"] <= 1e-2
        assert row["evaluations"] >= 1
        assert (row["solver"] == "serial") == (row["windows"][-1] == 1)
        assert "8 timesteps" in row["plan"]


def test_pipelines(figures):
    pytest.importorskip("transformers")
    families = ("ddim", "sd-img2img", "flux")
    report, table = figures("pipelines", "--families", *families, "--steps", "6", "--repeats", "1")
    assert [row["family"] for row in report["rows"]] == ["ddim", *["sd-img2img"] * 3, "flux"]
    for row in report["rows"]:
        assert row["family"] in table
        assert row["error"] <= 1e-2
        assert 0 < row["rounds"] <= row["steps"] == (4 if "img2img" in row["family"] else 6)
        assert row["parallel"][0]["calls"] >= row["rounds"]
        assert row["plain"][0]["calls"] == row["steps"] * (2 if row["family"] == "flux" else 1)
        assert all(run["outside"] > 0 for side in ("plain", "parallel") for run in row[side])


def test_refusals(baseline, tmp_path, capsys):
    for words, said in {
        ("rounds", *MIXTURE, "--solvers", "newton?"): "expected some of picard",
        ("rounds", *MIXTURE, "--json", str(tmp_path / "missing" / "x.json")): "create it first",
        ("rounds", "--problem", "dpmpp", "--eta", "0.5"): "--eta: expected 0 for --problem dpmpp",
        ("kernels", "--shape", "1,2,3"): "four whole numbers",
        ("inversion", *MIXTURE, "--methods", "newton"): "invalid choice",
        ("inversion", *MIXTURE, "--data", str(tmp_path / "missing.npz")): "missing.npz",
    }.items():
        try:
            status = baseline.__main__.main(words)
        except SystemExit as stop:
            status = stop.code
        assert status == 2
        assert said in capsys.readouterr().err
