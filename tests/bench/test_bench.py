"""The benchmarks run, write what they should and refuse what they should; nothing here looks at a clock."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest
import torch

import deqdiff_fast as dq
from deqdiff_fast.kernels import available_backends

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "bench" / "__main__.py").is_file(), reason="bench/ is not beside the tests")

EVERY_OP = {"ddim_update", "anderson_step", "newton_scan", "inverse_scan", "node_scan", "secant_fit"}
MIXTURE = ("--model", "mixture", "--size", "8", "--steps", "8")


def bench(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run `python -m bench` in the root of the checkout, on one thread, against the deqdiff_fast imported here."""
    where = os.environ.get("PYTHONPATH", "")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": where, "PYTHONWARNINGS": "default"}
    command = [sys.executable, "-m", "bench", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_rounds(tmp_path, report_of):
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


def test_overhead(figures):
    report, table = figures("overhead", *MIXTURE, "--repeats", "2", "--solvers", "auto")
    row, *calls = report["rows"]
    assert len(row["runs"]) == 2
    assert "quasi-newton" in table
    measured = available_backends()["triton"] != "triton is not installed; install it with: pip install triton"
    assert ({call["op"] for call in calls} == EVERY_OP) == measured
    assert all(0 < run["model"] < run["seconds"] and 0 < run["share"] < 1 for run in row["runs"])


def test_inversion(figures, tmp_path):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "inversion.png"
    small = ("--model", "mixture", "--size", "4", "--steps", "6", "12", "--images", "2", "--epochs", "8")
    direct = ("ddim", "fixed_point", "equilibrium", "auto")
    methods = ("bptt", "phantom", "implicit", *direct)
    report, table = figures("inversion", *small, "--plot", plot)
    rows = report["rows"]
    assert {(row["steps"], row["method"]) for row in rows if row["table"] == "descent"} == {
        (steps, method) for steps in (6, 12) for method in methods
    }
    assert {row["method"] for row in rows if row["table"] == "round trip"} == set(direct)
    by = {(row["table"], row["steps"], row["method"]): row for row in rows}
    for row in rows:
        assert row["method"] in table
        assert len(row["losses"]) == len(row["errors"]) == row["images"]
        assert row["curve"][-1][3] == pytest.approx(median(row["losses"]))
        spent = [point[1] for point in row["curve"]]
        assert spent == sorted(spent)
        if row["method"] in methods[:3]:
            assert row["optimizer_steps"] <= 8
            assert row["curve"][-1][3] <= row["curve"][0][3]
    for steps in (6, 12):
        bptt, phantom = by["descent", steps, "bptt"], by["descent", steps, "phantom"]
        assert bptt["evaluations"] == 2 * steps * 8 == 2 * bptt["backpropagations"]
        assert bptt["curve"][0][3] == pytest.approx(phantom["curve"][0][3], rel=1e-6)  # the same noise
        assert phantom["backpropagations"] == 0
        assert by["round trip", steps, "ddim"]["evaluations"] == 2 * steps
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_inversion_in_float64(figures):
    small = ("--model", "mixture", "--size", "4", "--steps", "8", "--images", "2", "--methods", "equilibrium")
    report, _ = figures("inversion", *small, "--dtype", "float64", "--tol", "1e-7", "--ends-only")
    for row in report["rows"]:
        assert max(row["errors"]) <= 1e-7, "beyond float32"
        assert len(row["curve"]) == 1


def test_gradients(figures):
    report, table = figures("gradients", "--model", "mixture", "--size", "6", "--steps", "10", "--check")
    rows = {row["mode"].split("(")[0]: row for row in report["rows"]}
    assert set(rows) == {"implicit", "phantom", "unrolled", "reversible"}
    assert table.count("PASS") == 3
    assert "FAIL" not in table
    for mode in ("implicit", "unrolled", "reversible"):
        assert 0 < rows[mode]["noise"][0] <= 1e-3
        assert 0 < rows[mode]["parameters"][0] <= 1e-3
        assert rows[mode]["backpropagations"] >= 10
    assert rows["phantom"]["noise"][0] > 0.1


def test_images_of_cifar10(baseline, tmp_path):
    """Both ways in which the data set is stored, on two pictures."""
    import io
    import pickle

    import numpy as np

    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32), dtype=np.uint8)
    (tmp_path / "test_batch").write_bytes(pickle.dumps({b"data": pixels.reshape(2, -1)}))
    files = []
    for picture in pixels:
        stream = io.BytesIO()
        image.fromarray(np.ascontiguousarray(picture.transpose(1, 2, 0))).save(stream, "PNG")
        files.append(np.frombuffer(stream.getvalue(), np.uint8))
    offset = np.cumsum([0, *map(len, files)])
    np.savez(tmp_path / "packed.npz", jpeg=np.concatenate(files), offset=offset)
    from bench._images import cifar10

    for path in (tmp_path, tmp_path / "packed.npz"):
        assert np.array_equal(cifar10(path).numpy(), pixels)
    np.savez(tmp_path / "other.npz", images=pixels)
    with pytest.raises(ValueError, match="jpeg and offset, got images"):
        cifar10(tmp_path / "other.npz")


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
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(missing), os.environ.get("PYTHONPATH", "")]))
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


def test_equilibrium(tmp_path, report_of):
    pytest.importorskip("torchdeq")
    file = tmp_path / "equilibrium.json"
    done = bench("equilibrium", "--json", file, "--sizes", "mlp", "--passes", "1", "--tol", "1e-2")
    assert done.returncode == 0, done.stderr
    rows = report_of("equilibrium", file)["rows"]
    assert [(row["solver"], row["library"]) for row in rows] == [
        (solver, library) for solver in ("anderson", "relaxed") for library in ("deqdiff_fast", "torchdeq")
    ]
    for row in rows:
        assert row["error"] < 2e-2
        assert row["gradient_error"] < 5e-2


def test_equilibrium_without_torchdeq(monkeypatch, capsys):
    main = importlib.import_module("bench.__main__").main
    monkeypatch.setitem(sys.modules, "torchdeq", None)
    assert main(["equilibrium"]) == 2
    assert "pip install --no-deps torchdeq" in capsys.readouterr().err
