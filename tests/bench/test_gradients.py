"""What gradients and inversions cost, implicit layers included; nothing here looks at a clock."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).resolve().parents[2]


pytestmark = pytest.mark.skipif(not (ROOT / "bench" / "__main__.py").is_file(), reason="bench/ is not beside the tests")


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


def test_equilibrium(bench, tmp_path, report_of):
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
