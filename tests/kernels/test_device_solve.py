"""Whole solves through the Triton kernels, the loop's decisions on the device: interpreted on the CPU, or on CUDA."""

from __future__ import annotations

import os

import pytest
import torch

import deqdiff_fast as dq
from deqdiff_fast.engine import solve
from deqdiff_fast.inversion import Equilibrium
from deqdiff_fast.kernels import available_backends
from deqdiff_fast.loop.task import Lookahead

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
ABAR = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)


def model(x, t):
    return 0.9 * x + 0.1 * torch.tanh(x.roll(1, -1) + 1e-3 * t.to(x.dtype)[:, None])


@pytest.mark.parametrize(
    ("solver", "window"),
    [
        (dq.QuasiNewton(history=2), "auto"),
        (dq.QuasiNewton(history=1, history_dtype=torch.bfloat16), 3),
        (dq.Anderson(history=2), "auto"),
        (dq.Anderson(history=2, history_dtype=torch.bfloat16), 3),
        (dq.Picard(), 3),
    ],
    ids=["newton", "newton-bf16-window", "triangular", "triangular-bf16-window", "picard-window"],
)
def test_triton_solves_the_serial_chain(monkeypatch, relative_error, solver, window):
    status = available_backends()["triton"]
    if status != "available":
        pytest.skip(status)
    monkeypatch.setattr(solve, "lookahead_policy", lambda system, request: Lookahead())
    schedule = dq.Schedule.ddim(ABAR, torch.arange(6).flip(0) * 150, eta=0.2)
    start = torch.randn(2, 20, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    sampler = dq.DEQSampler(model, schedule, solver=solver, window=window, backend="triton", tol=1e-4)
    out = sampler.sample(start, generator=torch.Generator().manual_seed(1))
    plain = dq.DEQSampler(model, schedule, backend="reference")
    expected = plain.serial(start, generator=torch.Generator().manual_seed(1))
    assert out.converged.all()
    assert out.stats.finished_serially == 0
    assert relative_error(out.sample.cpu(), expected.sample.cpu()).max() < 1e-4


def test_triton_inverts_the_serial_chain(relative_error):
    """A stiff row, which has a long history of its own, and others."""
    status = available_backends()["triton"]
    if status != "available":
        pytest.skip(status)
    schedule = dq.Schedule.ddim(ABAR, torch.arange(4).flip(0) * 240)
    noise = torch.randn(2, 12, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    image = dq.DEQSampler(model, schedule, backend="reference").serial(noise).sample
    method = Equilibrium(history=2, long_history=9)
    found = dq.DEQInverter(model, schedule, method=method, backend="triton", tol=1e-3).invert(image)
    assert found.converged.all()
    assert found.stats.finished_serially == 0
    assert found.error.max() < 1e-3
