"""How many rounds and how exact: rounds, accuracy, calibration, guesses; nothing here looks at a clock."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


pytestmark = pytest.mark.skipif(not (ROOT / "bench" / "__main__.py").is_file(), reason="bench/ is not beside the tests")


MIXTURE = ("--model", "mixture", "--size", "8", "--steps", "8")


def test_rounds(bench, tmp_path, report_of):
    """As a process of its own, which is how benchmarks are run; the others are spared the imports."""
    pytest.importorskip("matplotlib")
    plot, file = tmp_path / "rounds.png", tmp_path / "rounds.json"
    done = bench("rounds", "--json", file, *MIXTURE, "--eta", "0", "0.5", "--noises", "2", "--plot", plot)
    assert done.returncode == 0, done.stderr
    rows, table = report_of("rounds", file)["rows"], done.stdout
    named = {row["solver"].removesuffix(" = auto") for row in rows}
    assert {
        "serial",
        "picard",
        "anderson",
        "triangular",
        "trajectory",
        "deq-ddim",
        "paradigms",
        "parataa",
        "parareal",
        "quasi-newton",
        "quasi-newton, full rounds",
    } == named
    assert len(rows) == 2 * len(named)
    assert all(row["solver"] in table for row in rows)
    for row in rows:
        for run in row["runs"]:
            assert run["error"] <= 1e-2
            assert run["rounds"] <= (12 if row["solver"] == "parareal" else 8)  # its rounds come block by block
            assert run["evaluations"] >= 8
            errors = [error for _, error in run["curve"]]
            first = run["rounds_to"][0]  # the row must say what the curve says
            if row["solver"] != "serial":
                assert all(error <= 1e-2 for error in errors[first - 1 :])
                assert first == 1 or errors[first - 2] > 1e-2
                assert errors[-1] <= 1e-4
                assert run["curve"][-1][0] >= 8
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("problem", "steps", "solvers"),
    [("policy", 12, ["parareal"]), ("latent", 6, ["picard"]), ("flow", 3, ["picard"]), ("ddpm", 4, ["picard"]),
     ("dpmpp", 4, ["picard"])],
)  # fmt: skip
def test_rounds_of_other_chains(figures, baseline, monkeypatch, problem, steps, solvers):
    """Once: the solve at the default tolerance is the one that is watched. What cannot be solved is left out."""
    fitted = baseline._policy.fitted
    monkeypatch.setattr(baseline._policy, "fitted", lambda steps: fitted(60))  # as good a chain as a trained one
    words = ("--steps", steps, "--noises", "1", "--targets", "1e-1", "5e-3", "--once")
    report, table = figures("rounds", "--problem", problem, *words, "--solvers", *solvers, "parareal")
    rows = {row["solver"]: row for row in report["rows"]}
    assert set(rows) == {"serial", *solvers, *(() if problem == "dpmpp" else ("parareal",))}
    assert "rounds to 1e-1 | rounds to 5e-3 | evaluations / T to 1e-1" in " ".join(table.split())
    for name, row in rows.items():
        assert (row["steps"], row["eta"]) == (steps, 1.0 if problem == "policy" else 0.0)
        (run,) = row["runs"]
        assert run["error"] <= 1e-2
        if name != "serial":
            assert len(run["curve"]) == run["rounds"]
            assert run["curve"][-1] == [run["evaluations"], run["error"]]
            assert run["rounds_to"][0] <= run["rounds_to"][1] <= run["rounds"]


def test_rounds_at_tolerances(figures):
    words = ("--at", "1e-1", "1e-4", "--solvers", "auto", "picard", "--noises", "3")
    report, table = figures("rounds", *MIXTURE, *words)
    rows = report["rows"]
    assert [(row["solver"], row["tol"]) for row in rows] == [
        (solver, tol) for solver in ("picard", "quasi-newton = auto") for tol in (1e-1, 1e-4)
    ]
    for loose, tight in (rows[:2], rows[2:]):
        assert len(loose["runs"]) == len(tight["runs"]) == 3
        for run, other in zip(loose["runs"], tight["runs"], strict=True):
            assert run["rounds"] <= other["rounds"]
            assert run["error"] <= 1e-1
            assert other["error"] <= 1e-4
            assert other["psnr"] >= max(run["psnr"], 60)
    assert table.count("0 of 3") == 4


def test_a_flow_is_the_model_it_is_made_of(baseline):
    """At a trained timestep, with the prediction known: a v-model that knows its x0 and eps gives eps - x0."""
    from bench._chains import Flow
    from bench._problems import ABAR

    draw = torch.Generator().manual_seed(0)
    clean, eps = torch.randn(2, 6, 3, 4, 4, generator=draw, dtype=torch.float64)
    steps = torch.tensor([1, 40, 200, 500, 800, 999])
    alpha, sigma = ABAR[steps].sqrt().view(-1, 1, 1, 1), (1 - ABAR[steps]).sqrt().view(-1, 1, 1, 1)
    asked = []

    def model(x, t):
        asked.append((x, t))
        return alpha * eps - sigma * clean

    s = sigma / (alpha + sigma)
    out = Flow(model)((1 - s) * clean + s * eps, 1000 * s.flatten())
    ((x, t),) = asked
    torch.testing.assert_close(t, steps.double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(x, alpha * clean + sigma * eps)
    torch.testing.assert_close(out, eps - clean)
    halfway = Flow(model).timestep((s.flatten()[2:3] + s.flatten()[3:4]) / 2)
    assert 200 < float(halfway) < 500
    assert Flow(model).timestep(torch.tensor([1.0, 1e-6])).tolist() == [999.0, 0.0]


def test_accuracy(figures):
    report, table = figures("accuracy", *MIXTURE, "--noises", "2", "--solvers", "picard", "auto")
    assert len(report["rows"]) == 2 * 2 * 2
    assert table.count("PASS") == 9
    assert "FAIL" not in table
    for row in report["rows"]:
        assert row["error"] == max(row["errors"]) <= row["promised"]
        assert row["unconverged"] == 0


def test_calibration(figures, tmp_path):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "calibration.png"
    words = ("--noises", "5", "--batch", "3", "--eta", "0", "--random", "10", "--plot", plot, "--check")
    report, table = figures("calibration", *MIXTURE, *words)
    assert [row["tol"] for row in report["rows"]] == [1e-2, 1e-4, 1e-2, 1e-4]
    assert [len(row["errors"]) for row in report["rows"]] == [5, 5, 20, 20]
    for row in report["rows"]:
        assert all(row["converged"])
        assert 0 < max(row["errors"]) <= row["tol"]
    assert table.count("PASS") == 4
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_false_promise_fails_the_calibration(baseline):
    calibration = importlib.import_module("bench.calibration")
    row = {"tol": 1e-2, "errors": [1e-3] * 300, "converged": [True] * 300}
    assert calibration._holds(row)
    assert calibration._holds(row | {"errors": [1e-3] * 299 + [2e-2]})
    assert not calibration._holds(row | {"errors": [1e-3] * 298 + [2e-2] * 2})
    assert not calibration._holds(row | {"errors": [1e-3] * 299 + [4e-2]})
    assert calibration._holds(row | {"errors": [1e-3] * 299 + [4e-2], "converged": [True] * 299 + [False]})


def test_guesses(figures):
    report, table = figures("guesses", *MIXTURE, "--noises", "2")
    rows = {row["guess"]: row["runs"] for row in report["rows"]}
    assert set(rows) == {"none", "10% noise", "10% another sample", "30% noise", "30% another sample", "2 steps"}
    assert table.count("quasi-newton") == len(rows)
    for name, runs in rows.items():
        assert all(run["error"] <= 1e-2 for run in runs)
        assert all(len(run["curve"]) == run["rounds"] for run in runs)
        if "%" in name:
            assert all(run["guess"] == pytest.approx(float(name.split("%")[0]) / 100, rel=1e-3) for run in runs)


def test_another_noise_schedule_asks_the_model_at_its_own_time(baseline):
    problems = importlib.import_module("bench._problems")
    linear = problems.ABAR
    torch.testing.assert_close(problems.same_levels(linear), torch.arange(1000.0, dtype=torch.float64))
    angle = (torch.arange(1, 401, dtype=torch.float64) / 401 * 0.99 + 0.008) / 1.008 * torch.pi / 2
    cosine = angle.cos().square()
    times = problems.same_levels(cosine)
    before = times.floor().long().clamp_max(398)
    level = torch.logit(cosine)
    found = level[before] + (times - before) * (level[before + 1] - level[before])
    inside = (torch.logit(linear) <= level[0]) & (torch.logit(linear) >= level[-1])
    assert inside.sum() > 850
    torch.testing.assert_close(found[inside], torch.logit(linear)[inside])
    asked = problems.at_times(lambda x, t, scale: scale * t, times)
    assert torch.equal(asked(None, torch.tensor([3, 999]), scale=2), 2 * times[[3, 999]])
