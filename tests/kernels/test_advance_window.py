"""advance_window: the Triton kernels against the plain-torch reference; arguments, opcheck."""

from __future__ import annotations

import os

import pytest
import torch

from deqdiff_fast.kernels import advance_window

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
runs_triton = pytest.mark.skipif(not (INTERPRETED or DEVICE == "cuda"), reason="needs CUDA or TRITON_INTERPRET=1")


def board(steps, batch, capacity, dtype=torch.float32):
    """previous_bounds, decision, rows, poisoned."""
    return (
        torch.full((2, batch), -7, dtype=torch.int32),
        torch.full((4, batch), float("nan"), dtype=dtype),
        torch.full((capacity,), -7, dtype=torch.int64),
    )


def arguments(steps, batch, width, seed, bad=None):
    draw = torch.Generator().manual_seed(seed)
    lo = torch.randint(0, max(steps - 1, 1), (batch,), generator=draw, dtype=torch.int32)
    lo[0] = 0
    if batch > 2:
        lo[2] = steps  # done
    hi = (lo + width).clamp_max(steps)
    diff = 10 ** (3 * torch.rand(steps, batch, generator=draw) - 6.5)
    norm = torch.rand(steps, batch, generator=draw) + 0.5
    diff[: int(lo[-1]), -1] = float("nan")  # not in the window: must not be looked at
    if bad is not None:
        diff[int(lo[0]) + bad[0], 0] = bad[1]
    return diff, norm, lo, hi


@runs_triton
@pytest.mark.parametrize("bad", [None, (0, float("nan")), (1, float("inf"))], ids=["finite", "nan", "inf"])
@pytest.mark.parametrize(("steps", "batch", "width"), [(1, 1, 1), (7, 3, 7), (300, 4, 150), (600, 3, 600)])
def test_triton_advances_as_the_reference(steps, batch, width, bad):
    if bad is not None and bad[0] >= steps:
        pytest.skip("no such row")
    for seed, thresholds in enumerate([(1e-3, 1e-2), (5e-2, 1e-1), (1e-9, 1e-9)]):
        diff, norm, lo, hi = arguments(steps, batch, width, seed, bad)
        sides = []
        previous_bounds, decision, rows = board(steps, batch, width * batch + 3)
        for backend in ("reference", "triton"):
            held = [t.clone().to(DEVICE) for t in (diff, norm, lo, hi, previous_bounds, decision, rows)]
            advance_window(*held, *thresholds, width, backend=backend)
            sides.append([t.cpu() for t in held])
        for name, one, two in zip(("lo", "hi", "previous_bounds", "decision", "rows"), sides[0][2:], sides[1][2:]):
            torch.testing.assert_close(two, one, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.skipif(INTERPRETED, reason="the dispatcher is tested where nothing is interpreted")
def test_opcheck():
    diff, norm, lo, hi = arguments(9, 3, 9, 0)
    args = (diff, norm, lo, hi, *board(9, 3, 27), 1e-3, 1e-2, 9)
    torch.library.opcheck(torch.ops.deqdiff_fast.advance_window.default, args)


def test_bad_arguments():
    diff, norm, lo, hi = arguments(9, 3, 9, 0)
    previous_bounds, decision, rows = board(9, 3, 27)
    with pytest.raises(ValueError, match=r"lo: expected dtype int32"):
        advance_window(diff, norm, lo.long(), hi, previous_bounds, decision, rows, 1e-3, 1e-2, 9)
    with pytest.raises(ValueError, match=r"decision: expected shape \(4, 3\)"):
        advance_window(diff, norm, lo, hi, previous_bounds, decision[:2], rows, 1e-3, 1e-2, 9)
    with pytest.raises(ValueError, match="backend: expected one of auto"):
        advance_window(diff, norm, lo, hi, previous_bounds, decision, rows, 1e-3, 1e-2, 9, backend="cuda")
