"""The benchmark of restoration: its denoiser is one, its measurements are the same for all, its tables say what ran."""

from __future__ import annotations

import argparse

import pytest
import torch


@pytest.fixture
def problem(baseline):
    from bench._problems import load

    return load(argparse.Namespace(model="mixture", size=8, device="cpu", alone=True))


@pytest.mark.parametrize("sigma", [0.05, 0.3, 1.0])
def test_the_denoiser_is_the_posterior_mean_in_units_of_zero_to_one(problem, sigma):
    """Of the mixture it is known: a weighted mean of every component's own."""
    from bench._deepinv import SigmaDenoiser

    mixture, draw = problem.model, torch.Generator().manual_seed(0)
    clean = mixture.means.view(-1, 3, 8, 8) + mixture.variance**0.5 * torch.randn(10, 3, 8, 8, generator=draw)
    noisy = (clean + 1) / 2 + sigma * torch.randn(clean.shape, generator=draw)
    level = (2 * sigma) ** 2
    away = (2 * noisy - 1).flatten(1)[:, None] - mixture.means[None]  # (sample, component, D)
    share = (-0.5 * away.square().sum(2) / (mixture.variance + level)).softmax(1)
    gain = mixture.variance / (mixture.variance + level)
    expected = (share[..., None] * (mixture.means + gain * away)).sum(1).view_as(clean)
    denoiser = SigmaDenoiser(problem)
    found = denoiser(noisy, sigma)
    assert (denoiser.calls, denoiser.rows) == (1, 10)
    # the mixture takes whole timesteps only, whose noise is off by half a per cent
    torch.testing.assert_close(found, (expected + 1) / 2, rtol=0.05, atol=0.02)
    error = (found - (clean + 1) / 2).square().mean()
    for wrong in (sigma / 2, 2 * sigma):
        assert error < (denoiser(noisy, wrong) - (clean + 1) / 2).square().mean()


def test_each_sample_has_its_own_noise_level(problem):
    from bench._deepinv import SigmaDenoiser

    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    denoiser = SigmaDenoiser(problem)
    together = denoiser(x, torch.tensor([0.1, 0.5]))
    torch.testing.assert_close(together[1:], denoiser(x[1:], 0.5))
    torch.testing.assert_close(denoiser(x, 0.0), x)


def test_deepinv_gets_the_same_operator_and_measurements(problem):
    pytest.importorskip("deepinv")
    from bench._deepinv import physics_of
    from bench.restoration import OPERATORS, operator_for

    x = 2 * torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) - 1
    for name in OPERATORS:
        operator = operator_for(name, problem.shape, 0.1)
        physics = physics_of(operator, tuple(x.shape), 0.1, "cpu")
        pixels = (operator.A(x) + operator.A(torch.ones_like(x))) / 2  # as `bench restoration` has them
        away = (physics.A((x + 1) / 2) - pixels).norm()  # singular values below the cutoff are left out
        assert away <= max(1e-4, operator.cutoff(torch.float32)) * x.norm(), name
        kept, expected = physics.A_dagger(pixels), operator.A_dagger(pixels)
        torch.testing.assert_close(physics.A(kept), operator.A(expected), rtol=1e-2, atol=1e-2, msg=name)


def test_ours_are_the_serial_chain_in_fewer_calls(figures):
    pytest.importorskip("torchmetrics")
    words = (
        "--model",
        "mixture",
        "--size",
        "8",
        "--count",
        "2",
        "--steps",
        "25",
        "--sigma",
        "0.1",
        "--temperatures",
        "1",
    )
    report, table = figures("restoration", *words, "--operators", "inpaint", "--methods", "ddnm", "ddrm")
    rows = {(row["method"], row["setting"]): row for row in report["rows"]}
    assert len(rows) == 5
    for method in ("ours ddnm", "ours ddrm"):
        parallel, serial = rows[method, "parallel, temperature 1"], rows[method, "serial, temperature 1"]
        assert parallel["unconverged"] == 0
        assert parallel["from_serial"] <= 1e-2
        assert parallel["sequential_calls"] < serial["sequential_calls"] == 25
        assert serial["evaluations"] == 25
        assert parallel["psnr"] > rows["A_dagger y", ""]["psnr"] + 1
        assert method in table


def test_ours_serially_are_compared_at_equal_evaluations(figures):
    pytest.importorskip("deepinv")
    pytest.importorskip("torchmetrics")
    words = (
        "--model",
        "mixture",
        "--size",
        "8",
        "--count",
        "2",
        "--steps",
        "6",
        "--evaluations",
        "6",
        "12",
        "--serial",
    )
    report, table = figures("restoration", *words, "--operators", "inpaint", "--methods", "diffpir", "DDRM")
    rows = [row for row in report["rows"] if row["method"] != "A_dagger y"]
    assert [row["evaluations"] for row in rows] == [6, 6, 12]
    assert rows[0]["setting"] == "serial, temperature 0.25"
    assert "the best at no more evaluations (6 and 6)" in table


def test_theirs_run_within_their_evaluations(figures):
    pytest.importorskip("deepinv")
    pytest.importorskip("torchmetrics")
    words = ("--model", "mixture", "--size", "8", "--count", "2", "--evaluations", "6", "--sigma", "0.1")
    report, table = figures("restoration", *words, "--operators", "inpaint", "--methods", "DDRM", "DiffPIR", "DPS")
    rows = {row["method"]: row for row in report["rows"]}
    assert set(rows) == {"A_dagger y", "deepinv DDRM", "deepinv DiffPIR", "deepinv DPS"}
    for name in ("DDRM", "DiffPIR", "DPS"):
        assert rows[f"deepinv {name}"]["evaluations"] == rows[f"deepinv {name}"]["sequential_calls"] == 6
    assert rows["deepinv DDRM"]["psnr"] > rows["A_dagger y"]["psnr"] + 1  # the prior knows what was not measured
    assert "deepinv DPS" in table


def test_rounds_are_counted_beside_the_papers(figures):
    words = ("--model", "mixture", "--size", "8", "--count", "2", "--watched", "1", "--steps", "20", "--sigma", "0.1")
    report, table = figures("restoration", "--rounds", *words, "--operators", "inpaint", "--methods", "ddnm", "diffpir")
    rows = {(row["method"], row["sigma"], row["eta"]): row for row in report["rows"]}
    assert len(rows) == 6  # DiffPIR is DDNM without noise
    for row in rows.values():
        assert max(row["errors"]) <= 1e-2
        assert len(row["errors"]) == 2
        assert max(row["tight_errors"]) <= 1e-4
        assert len(row["tight_errors"]) == 1
        assert row["rounds"] <= row["tight_rounds"]
        assert row["rounds"] < row["anderson_rounds"]
        assert row["anderson_to"] is None or row["anderson_to"] <= row["anderson_rounds"]
    assert rows["ddnm", 0.0, 0.85]["consistency"] <= 1e-4
    assert "error at most 0.01: 6 of 6" in table


def test_what_ran_is_compared(baseline, capsys):
    import bench.restoration as restoration

    def row(method: str, setting: str, psnr: float, evaluations: float) -> dict:
        return {"operator": "sr4", "method": method, "setting": setting, "psnr": psnr, "evaluations": evaluations}

    rows = [row("ours ddnm", "parallel", 20.0, 60.0), row("deepinv DDRM", "", 19.0, 50.0)]
    assert restoration._compare(rows, check=True) == 0
    assert (
        "ours ddnm parallel +1.00 dB from deepinv DDRM, the best at no more evaluations (60 and 50)"
        in capsys.readouterr().out
    )
    rows.append(row("deepinv DPS", "", 20.4, 100.0))
    assert restoration._compare(rows, check=False) == 0
    assert restoration._compare(rows, check=True) == 1
    assert "-0.40 dB from deepinv DPS, the best of all" in capsys.readouterr().out
