"""The ops of the loop itself: the Triton kernels against their plain-torch references; arguments, opcheck."""

from __future__ import annotations

import os

import pytest
import torch

from deqdiff_fast.kernels import advance_window, available_backends, copy_rows, judge_steps

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
runs_triton = pytest.mark.skipif(not (INTERPRETED or DEVICE == "cuda"), reason="needs CUDA or TRITON_INTERPRET=1")


def board(steps, batch, capacity, dtype=torch.float32):
    """was, verdict, rows, poisoned."""
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
@pytest.mark.parametrize("ends", [(), (1.0, 0.5)], ids=["by step", "by contraction"])
@pytest.mark.parametrize("bad", [None, (0, float("nan")), (1, float("inf"))], ids=["finite", "nan", "inf"])
@pytest.mark.parametrize(("steps", "batch", "width"), [(1, 1, 1), (7, 3, 7), (300, 4, 150), (600, 3, 600)])
def test_triton_advances_as_the_reference(steps, batch, width, bad, ends):
    if bad is not None and bad[0] >= steps:
        pytest.skip("no such row")
    for seed, thresholds in enumerate([(1e-3, 1e-2), (5e-2, 1e-1), (1e-9, 1e-9)]):
        diff, norm, lo, hi = arguments(steps, batch, width, seed, bad)
        sides = []
        was, verdict, rows = board(steps, batch, width * batch + 3)
        verdict[3] = torch.tensor([0.1, 0.0, float("inf"), float("nan")])[(torch.arange(batch) + seed) % 4]
        for backend in ("reference", "triton"):
            held = [t.clone().to(DEVICE) for t in (diff, norm, lo, hi, was, verdict, rows)]
            advance_window(*held, *thresholds, width, *ends, backend=backend)
            sides.append([t.cpu() for t in held])
        for name, one, two in zip(("lo", "hi", "was", "verdict", "rows"), sides[0][2:], sides[1][2:]):
            torch.testing.assert_close(two, one, msg=lambda text, name=name: f"{name}: {text}")


@runs_triton
@pytest.mark.parametrize(("kind", "size"), [(torch.float32, 40), (torch.bfloat16, 2051)])
def test_triton_copies_as_the_reference(kind, size):
    target, ring = torch.randn(11, 3, size, device=DEVICE), torch.randn(5, 3, size, device=DEVICE).to(kind)
    first = torch.tensor([0, 4, 9], dtype=torch.int32, device=DEVICE)
    last = torch.tensor([4, 4, 13], dtype=torch.int32, device=DEVICE)
    sides = [target.clone() for _ in range(2)]
    for side, backend in zip(sides, ("reference", "triton")):
        copy_rows(side, ring, first, last, backend=backend)
    assert torch.equal(*sides)
    assert not torch.equal(sides[0], target)


@pytest.mark.skipif(INTERPRETED, reason="the dispatcher is tested where nothing is interpreted")
def test_opcheck():
    diff, norm, lo, hi = arguments(9, 3, 9, 0)
    args = (diff, norm, lo, hi, *board(9, 3, 27), 1e-3, 1e-2, 9)
    torch.library.opcheck(torch.ops.deqdiff_fast.advance_window.default, args)
    args = (torch.randn(5, 2, 8), torch.randn(2, 2, 8), torch.zeros(2).int(), torch.full((2,), 3).int())
    torch.library.opcheck(torch.ops.deqdiff_fast.copy_rows.default, args)


def test_bad_arguments():
    diff, norm, lo, hi = arguments(9, 3, 9, 0)
    was, verdict, rows = board(9, 3, 27)
    with pytest.raises(ValueError, match=r"lo: expected dtype int32"):
        advance_window(diff, norm, lo.long(), hi, was, verdict, rows, 1e-3, 1e-2, 9)
    with pytest.raises(ValueError, match=r"verdict: expected shape \(4, 3\)"):
        advance_window(diff, norm, lo, hi, was, verdict[:2], rows, 1e-3, 1e-2, 9)
    with pytest.raises(ValueError, match="backend: expected one of auto"):
        advance_window(diff, norm, lo, hi, was, verdict, rows, 1e-3, 1e-2, 9, backend="cuda")
    with pytest.raises(ValueError, match="target, source: expected shapes"):
        copy_rows(torch.zeros(3, 2, 8), torch.zeros(2, 8), lo, hi)
    with pytest.raises(ValueError, match="first: expected shape"):
        copy_rows(torch.zeros(3, 2, 8), torch.zeros(2, 2, 8), lo, hi)


def steps_to_judge(steps, batch, dtype=torch.float64):
    """Steps of all lengths after others of all lengths, with zeros, NaN and Inf among both."""
    draw = torch.Generator().manual_seed(steps)
    diff, previous = (10 ** (9 * torch.rand(steps, batch, generator=draw, dtype=torch.float64) - 9) for _ in range(2))
    norm = torch.rand(steps, batch, generator=draw, dtype=torch.float64) + 0.5
    odd = [0.0, float("nan"), float("inf")]
    for k, tensor in enumerate((diff, previous, norm)):
        for at, value in enumerate(odd):
            tensor.view(-1)[(7 * at + 3 * k) % tensor.numel()] = value
    return [t.to(dtype) for t in (diff, norm, previous)], torch.tensor([1.0, 0.01, 0.3][:batch], dtype=dtype)


@runs_triton
@pytest.mark.parametrize(("steps", "batch"), [(1, 1), (2, 3), (63, 2), (100, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_triton_judges_as_the_reference(steps, batch, dtype):
    given, strict = steps_to_judge(steps, batch, dtype)
    expected = [t.double() for t in given]
    actual = [t.clone().to(DEVICE) for t in given]
    judge_steps(*expected, strict.double(), 1e-3, 1e-6, backend="reference")
    judge_steps(*actual, strict.to(DEVICE), 1e-3, 1e-6, backend="triton")
    for a, b in zip(actual, expected):
        torch.testing.assert_close(a.double().cpu(), b, rtol=1e-5, atol=0, equal_nan=True)


@pytest.mark.parametrize(("steps", "batch"), [(1, 1), (2, 3), (63, 2), (100, 3)])
@pytest.mark.parametrize("kind", ["dense", "strided", "float32"])
def test_cpp_judges_as_the_reference(steps, batch, kind):
    if available_backends()["cpp"] != "available":
        pytest.skip(available_backends()["cpp"])
    given, strict = steps_to_judge(steps, batch, torch.float32 if kind == "float32" else torch.float64)
    expected, actual = ([t.clone() for t in given] for _ in range(2))
    if kind == "strided":
        actual = [torch.stack([t, t], 1)[:, 0] for t in actual]
    judge_steps(*expected, strict, 1e-3, 1e-6, backend="reference")
    judge_steps(*actual, strict, 1e-3, 1e-6, backend="cpp")
    for a, b in zip(actual, expected):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=0, equal_nan=True)
    assert torch.equal(actual[1].nan_to_num(), given[1].nan_to_num())


def test_judge_steps_is_known_to_torch():
    given, strict = steps_to_judge(9, 2)
    torch.library.opcheck(torch.ops.deqdiff_fast.judge_steps.default, (*given, strict, 1e-3, 1e-6))
    with pytest.raises(ValueError, match=r"previous: expected shape \(9, 2\), got \(8, 2\)"):
        judge_steps(*given[:2], given[2][1:], strict, 1e-3, 1e-6)
    with pytest.raises(ValueError, match="strict: expected dtype float64, got float32"):
        judge_steps(*given, strict.float(), 1e-3, 1e-6)
