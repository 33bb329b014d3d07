"""The affine scan on every backend against the float64 reference."""

from __future__ import annotations

import os

import pytest
import torch

from deqdiff_fast.errors import BackendUnavailableError
from deqdiff_fast.kernels import ddim_update
from deqdiff_fast.kernels.ddim_update.reference import ddim_update as reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 17), (2, 3, 1000), (63, 2, 3073), (100, 3, 1000)]
CASES = [
    pytest.param(dtype, shape, lags, id=f"{str(dtype)[6:]}-{'x'.join(map(str, shape))}-lags{lags}")
    for dtype in DTYPES
    for at, shape in enumerate(SHAPES)
    for lags in (1, 2, 3, 4)
    if not INTERPRETED or lags == 1 + at
]


def tolerances(backend, dtype, steps):
    """(rtol, atol) for states of order one, (rtol) for the squared norms.

    float32 and float64: each step rounds a handful of times and the coefficients contract, so errors stay at a few
    units in the last place. Half types: the kernels round once, when they store; the reference and cpp may carry
    rounded states forward, so errors of one unit add up over the few steps that the contraction remembers.
    """
    eps = torch.finfo(dtype).eps
    if dtype in (torch.float32, torch.float64):
        return 8 * eps, 16 * eps, 64 * eps
    if backend == "triton":
        return eps, 1e-5, 1e-5
    return 3 * eps, 3 * eps, 8 * eps


@pytest.mark.parametrize(("dtype", "shape", "lags"), CASES)
def test_equals_float64(backend, dtype, shape, lags, problem, small, close):
    (steps, size), batch = small(shape[0], shape[2], 9), shape[1]  # windows start where every lag is known
    given = problem(steps, batch, size, lags, dtype=dtype, drift=lags != 2)
    truth, actual = given.exact(), given.clone().serve(backend)
    reference(*truth.scan(), truth.drift)
    if backend == "cpp" and dtype == torch.float16:
        with pytest.raises(BackendUnavailableError, match="float16"):
            ddim_update(*actual.scan(), actual.drift, backend=backend)
        return
    ddim_update(*actual.scan(), actual.drift, backend=backend)
    rtol, atol, norm_rtol = tolerances(backend, dtype, steps)
    close(actual.states, truth.states, rtol, atol, "states")
    close(actual.sq_diff, truth.sq_diff, norm_rtol, 0.0, "sq_diff")
    close(actual.sq_norm, truth.sq_norm, norm_rtol, 0.0, "sq_norm")
    for b in range(batch):  # what lies outside the window keeps its bits
        first, last = int(given.lo[b]), int(given.hi[b])
        for kept, before in ((slice(None, first + 1), given.states), (slice(last + 1, None), given.states)):
            torch.testing.assert_close(actual.states[kept, b].cpu(), before[kept, b], rtol=0, atol=0, equal_nan=True)


def test_many_lags(backend, problem, close):
    """As many as PNDM's start needs; Triton keeps the lagged rows in registers and refuses so many."""
    given = problem(30, 2, 65, 11)
    truth, actual = given.exact(), given.clone().serve(backend)
    if backend == "triton":
        with pytest.raises(BackendUnavailableError, match="at most 4 lags, got 11"):
            ddim_update(*actual.scan(), actual.drift, backend=backend)
        return
    reference(*truth.scan(), truth.drift)
    ddim_update(*actual.scan(), actual.drift, backend=backend)
    close(actual.states, truth.states, 1e-6, 4e-6, "states")
    close(actual.sq_diff, truth.sq_diff, 1e-5, 0.0, "sq_diff")


def test_non_contiguous(backend, problem, small, close):
    steps, size = small(12, 130)
    given = problem(steps, 2, size, 2)
    truth, dense = given.exact(), given.serve(backend)
    reference(*truth.scan(), truth.drift)

    def strided(t):  # every second element of a larger tensor, with the first two dimensions swapped in memory
        spread = torch.empty(*(2 * n for n in t.shape), dtype=t.dtype, device=t.device)
        spread = spread.transpose(0, -1).contiguous().transpose(0, -1)
        view = spread[tuple(slice(None, None, 2) for _ in t.shape)]
        view.copy_(t)
        return view

    actual = dense.map(strided)
    assert not any(t.is_contiguous() for t in actual.scan() if t.numel() > 1)
    ddim_update(*actual.scan(), actual.drift, backend=backend)
    close(actual.states, truth.states, 1e-6, 2e-6, "states")
    close(actual.sq_diff, truth.sq_diff, 1e-5, 0.0, "sq_diff")
    close(actual.sq_norm, truth.sq_norm, 1e-5, 0.0, "sq_norm")


def test_same_bits_twice(backend, problem, small):
    if INTERPRETED:
        pytest.skip("the interpreter runs one program after the other")
    steps, size = small(40, 3073)
    given = problem(steps, 2, size, 2).serve(backend)
    runs = [given.clone(), given.clone()]
    for run in runs:
        ddim_update(*run.scan(), run.drift, backend=backend)
    for one, two in zip(runs[0].scan(), runs[1].scan(), strict=True):
        assert torch.equal(one.nan_to_num(), two.nan_to_num())


def test_threads_do_not_change_bits(backend, problem):
    if backend != "cpp":
        pytest.skip("only cpp has threads of its own")
    given = problem(40, 3, 3073, 2).serve("cpp")
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            run = given.clone()
            ddim_update(*run.scan(), run.drift, backend="cpp")
            results.append(run)
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for one, two in zip(results[0].scan(), other.scan(), strict=True):
            assert torch.equal(one.nan_to_num(), two.nan_to_num())


def test_chunks_of_time_do_not_change_bits(backend, problem, small):
    if backend != "triton":
        pytest.skip("only the Triton scan is cut into chunks")
    from deqdiff_fast.kernels.ddim_update import _triton

    steps, size = small(50, 1000, 9)
    given = problem(steps, 2, size, 4).serve(backend)
    runs = [given.clone() for _ in range(3)]
    for run, chunks in zip(runs, (1, 3, steps + 2), strict=True):
        _triton.launch(*run.scan(), run.drift, chunks=chunks)
    for other in runs[1:]:
        for one, two in zip(runs[0].scan(), other.scan(), strict=True):
            assert torch.equal(one.nan_to_num(), two.nan_to_num())


def test_empty_window_and_batch(backend, problem):
    given = problem(5, 2, 33).serve(backend)
    given.hi.copy_(given.lo)
    run = given.clone()
    ddim_update(*run.scan(), run.drift, backend=backend)
    for one, two in zip(run.scan(), given.scan(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)
    none = problem(5, 1, 33).map(lambda t: t).serve(backend)
    none.states, none.predictions, none.drift = none.states[:, :0], none.predictions[:, :0], none.drift[:, :0]
    none.lo, none.hi, none.sq_diff, none.sq_norm = none.lo[:0], none.hi[:0], none.sq_diff[:, :0], none.sq_norm[:, :0]
    ddim_update(*none.scan(), none.drift, backend=backend)
