"""The stopping rule in all its forms: reference, C++ and Triton, and the loop on the host, on the same residuals."""

from __future__ import annotations

import math
import os

import pytest
import torch

from deqdiff_fast.kernels import advance_window, available_backends, mark_converged, stopping
from deqdiff_fast.loop.stopping import StoppingRule
from deqdiff_fast.loop.window import Window

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FREEZE, FLOOR, FINISH = 1e-3, 1e-6, 1e-2
STEPS, BATCH = 9, 4
BACKENDS = ["reference", "cpp", "triton"]


def device_of(backend):
    if available_backends()[backend] != "available":
        pytest.skip(available_backends()[backend])
    return "cuda" if backend == "triton" and not INTERPRETED else "cpu"


def test_the_extension_has_the_same_constants():
    _C = pytest.importorskip("deqdiff_fast._C")
    found = _C.build_info()
    assert {name: found[name] for name in ("tiny", "min_rate", "max_rate", "first_rate")} == {
        "tiny": stopping.TINY, "min_rate": stopping.MIN_RATE, "max_rate": stopping.MAX_RATE,
        "first_rate": stopping.FIRST_RATE,
    }  # fmt: skip


def converged(step, before, strict):
    """Whether a row has converged, by the definition: Aitken's estimate of what is left to go."""
    rate = stopping.FIRST_RATE if math.isnan(before) else min(max(step / before, stopping.MIN_RATE), stopping.MAX_RATE)
    return step * rate / (1 - rate) <= FREEZE * strict or step <= FLOOR


CASES = [  # relative step, that of the round before
    (0.9e-3, math.nan), (1.1e-3, math.nan), (5e-3, 1.0), (10e-3, 1.0), (0.9e-3, 1.1e-3), (0.2e-3, 0.25e-3),
    (0.5e-3, 0.5e-3), (0.9e-6, 0.9e-6), (2e-6, 1e-9), (3e-3, math.inf), (0.5, 0.9), (0.0, 0.0),
]  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("strict", [1.0, 0.01])
def test_triton_and_the_others_mark_what_the_definition_says(backend, strict):
    device = device_of(backend)
    step, before = torch.tensor(CASES, dtype=torch.float64).T[:, :, None].to(device)
    norm, previous = torch.full_like(step, 4.0), before.square()
    diff, held = step.square() * norm, torch.full((1,), strict, dtype=torch.float64, device=device)
    mark_converged(diff, norm, previous, held, FREEZE, FLOOR, backend=backend)
    marked = ((diff / norm).sqrt() <= FREEZE * (1 + 1e-12))[:, 0].tolist()
    assert marked == [converged(now, last if last > 0 else math.nan, strict) for now, last in CASES]
    torch.testing.assert_close(previous, step.square())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [STEPS, 4])
def test_triton_and_the_others_move_the_window_as_the_host_does(backend, width):
    """Round after round, with rows that are not finite, and first rows that move by more than `freeze`."""
    device = device_of(backend)
    draw = torch.Generator().manual_seed(width)
    window, rule = Window(STEPS, BATCH, width), StoppingRule(FREEZE, FINISH, FLOOR)
    lo = torch.tensor(window.lo, dtype=torch.int32, device=device)
    hi = torch.tensor(window.hi, dtype=torch.int32, device=device)
    bounds = torch.zeros(2, BATCH, dtype=torch.int32, device=device)
    decision = torch.zeros(4, BATCH, dtype=torch.float64, device=device)
    rows = torch.zeros(STEPS * BATCH + 2, dtype=torch.int64, device=device)
    for number in range(8):
        residual = 10 ** (3 * torch.rand(STEPS, BATCH, generator=draw, dtype=torch.float64) - 4.2)
        if number == 2:
            residual[window.lo[1] : window.lo[1] + 2, 1] = torch.tensor([1e-4, math.nan])[: STEPS - window.lo[1]]
        old_hi = list(window.hi)
        advance_window(
            residual.square().to(device), torch.ones_like(residual, device=device), lo, hi, bounds, decision, rows,
            FREEZE, FINISH, width, backend=backend,
        )  # fmt: skip
        broken = (~residual.isfinite()).cumsum(0) > 0
        found = torch.where(broken, math.inf, residual).t().tolist()
        worst = rule.advance(window, found)
        assert lo.tolist() == window.lo
        assert hi.tolist() == window.hi
        assert decision[3].tolist() == pytest.approx(worst)
        assert bounds[1].tolist() == [max(a, b) for a, b in zip(old_hi, window.lo)]
        active = [i * BATCH + b for i in range(STEPS) for b in range(BATCH) if window.lo[b] <= i < window.hi[b]]
        assert rows[: len(active)].tolist() == active
