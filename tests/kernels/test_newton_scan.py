"""newton_scan: the compiled form against the float64 reference, and against what the formula promises."""

from __future__ import annotations

import os

import pytest
import torch

from deqdiff_fast.kernels import available_backends, ddim_update, newton_scan
from deqdiff_fast.kernels.newton_scan.reference import newton_scan as reference

NAN = float("nan")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class Case:
    """A random chain with several rounds of history, the unfilled parts NaN."""

    def __init__(
        self, steps, batch, size, lags=1, width=None, history=3, dtype=torch.float32, spectral=True, drift=False
    ):
        g = torch.Generator().manual_seed(steps * 131 + size)

        def draw(*shape):
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        self.steps, self.batch, self.size, self.width, self.ring = steps, batch, size, width or steps, history + 1
        early = torch.arange(steps)[:, None] >= torch.arange(lags)[None]
        self.a = torch.where(
            early, torch.full((steps, lags), 0.9 / lags, dtype=torch.float64) + 0.02 * draw(steps, lags), 0
        )
        self.b = torch.where(early, 0.1 * draw(steps, lags), 0)
        self.slope = (0.5 * draw(steps, size if spectral else 1)).to(torch.float32).double()
        self.x = draw(steps + 1, batch, size).to(dtype)
        self.drift = (0.1 * draw(steps, batch, size)).to(dtype) if drift else None
        self.predictions = [draw(steps, batch, size).to(dtype) for _ in range(5)]
        self.dtype = dtype

    def run(self, step, dtype, rounds=5, history=True, stored=None):
        states = self.x.to(dtype).clone()
        rings = [
            torch.full((self.ring, self.width, self.batch, self.size), NAN, dtype=stored or dtype) for _ in range(2)
        ]
        filled = torch.zeros(self.width, self.batch, dtype=torch.int32)
        lo = torch.arange(self.batch, dtype=torch.int32).clamp(max=self.steps)
        hi = (lo + self.width).clamp(max=self.steps) - (torch.arange(self.batch, dtype=torch.int32) % 2)
        hi = torch.maximum(hi, lo)
        sums = [torch.full((self.steps, self.batch), NAN, dtype=torch.float64) for _ in range(2)]
        for k in range(rounds):
            e = self.predictions[k].to(dtype)
            drift = None if self.drift is None else self.drift.to(dtype)
            extra = (*rings, filled, k % self.ring, 1e-6, 1e-5) if history else (None, None, None, 0, 1e-6, 1e-5)
            step(states, e, self.a, self.b, self.slope, lo, hi, *sums, *extra, drift)
        return states, sums, rings, filled


def triton_device():
    status = available_backends()["triton"]
    if status != "available":
        pytest.skip(status)
    return "cpu" if INTERPRETED else "cuda"


def close(got, expected, tolerance):
    mask = expected.isnan()
    assert torch.equal(got.isnan(), mask)
    scale = expected[~mask].abs().max() if (~mask).any() else 1
    assert (got[~mask].double() - expected[~mask]).abs().max() <= tolerance * scale if (~mask).any() else True


@pytest.mark.parametrize("steps", [1, 2, 63, 100])
@pytest.mark.parametrize("size", [1, 17, 1000, 3073])
@pytest.mark.parametrize("spectral", [True, False])
def test_matches_reference(steps, size, spectral):
    rounds = 5 if size < 1000 else 3
    case = Case(steps, 2, size, spectral=spectral, history=min(3, size, rounds - 1))
    expected = case.run(reference, torch.float64, rounds)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        if dtype == torch.float32 and size == 1:
            continue  # one random secant in one dimension: a chaotic recursion, only comparable in double
        got = case.run(lambda *a: newton_scan(*a, backend="cpp"), dtype, rounds)
        close(got[0], expected[0], tolerance)
        for k in range(2):
            close(got[1][k], expected[1][k], tolerance)
            close(got[2][k], expected[2][k], tolerance)
        assert torch.equal(got[3], expected[3])


@pytest.mark.parametrize("lags", [1, 2, 3])
@pytest.mark.parametrize("width", [5, 8, 20])
@pytest.mark.parametrize("history", [1, 5, 7])
def test_lags_windows_and_histories(lags, width, history):
    case = Case(20, 3, 100, lags=lags, width=width, history=history, drift=True)
    expected, got = (
        case.run(reference, torch.float64),
        case.run(lambda *a: newton_scan(*a, backend="cpp"), torch.float64),
    )
    close(got[0], expected[0], 1e-8)
    close(got[1][0], expected[1][0], 1e-8)


TRITON_CASES = [  # steps, size, lags, window, history, slope per element, dtype
    (1, 1, 1, None, 1, True, torch.float64),
    (6, 17, 1, None, 3, False, torch.float64),
    (7, 70, 2, 5, 3, True, torch.float64),
    (5, 70, 4, 4, 7, True, torch.float64),
    (8, 70, 3, 5, 0, True, torch.float64),
    (6, 17, 1, None, 1, False, torch.float32),
    (12, 17, 2, 4, 3, True, torch.float32),
]


@pytest.mark.parametrize("backend", ["triton"])
@pytest.mark.parametrize(("steps", "size", "lags", "width", "history", "spectral", "dtype"), TRITON_CASES)
def test_triton_matches_reference(backend, steps, size, lags, width, history, spectral, dtype):
    """On a GPU, or interpreted (test_interpreted.py). Three rounds: the ring's unfilled columns are NaN in all of them
    but the last, and with a window the rows leave their slots to later ones."""
    device = triton_device()
    case = Case(steps, 2, size, lags, width, history, dtype, spectral, drift=lags == 2)
    expected = case.run(reference, torch.float64, 3)

    def step(*args):
        moved = [t.to(device) if isinstance(t, torch.Tensor) else t for t in args]
        newton_scan(*moved, backend=backend)
        for before, after in zip(args, moved, strict=True):
            if isinstance(before, torch.Tensor) and before is not after:
                before.copy_(after)

    got = case.run(step, dtype, 3)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    for actual, exact in zip((got[0], *got[1], *got[2]), (expected[0], *expected[1], *expected[2]), strict=True):
        close(actual, exact, tolerance)
    assert torch.equal(got[3], expected[3])


@pytest.mark.parametrize("backend", ["triton"])
@pytest.mark.parametrize(("lags", "history"), [(1, 3), (2, 1)])
def test_triton_with_a_narrow_history(backend, lags, history):
    """The rings in bfloat16, the model linear around the exact state all the same. Two rounds: what the second one
    stores may differ by a rounding, which a third would magnify."""
    device = triton_device()
    case = Case(7, 2, 130, lags, 5, history, torch.float32, True)
    expected = case.run(reference, torch.float64, 2, stored=torch.bfloat16)

    def step(*args):
        moved = [t.to(device) if isinstance(t, torch.Tensor) else t for t in args]
        newton_scan(*moved, backend=backend)
        for before, after in zip(args, moved, strict=True):
            if isinstance(before, torch.Tensor) and before is not after:
                before.copy_(after)

    got = case.run(step, torch.float32, 2, stored=torch.bfloat16)
    close(got[0], expected[0], 1e-4)
    close(got[1][0], expected[1][0], 1e-4)
    assert got[2][0].dtype == torch.bfloat16
    for actual, exact in zip(got[2], expected[2], strict=True):
        close(actual.float(), exact.double(), 1e-2)


@pytest.mark.parametrize("backend", ["triton"])
@pytest.mark.parametrize("history", [0, 2])
def test_triton_reads_only_its_window(backend, history, problem, close):
    """Windows that start late, everything outside them NaN, rings that know different numbers of columns per row."""
    device, (steps, batch, size, width) = triton_device(), (9, 2, 20, 5)
    given = problem(steps, batch, size, 2, width=width, dtype=torch.float64)
    rings = torch.full((2, history + 1, width, batch, size), NAN, dtype=torch.float64)
    filled = (torch.arange(width * batch) % (history + 1)).to(torch.int32).view(width, batch)
    draw = torch.Generator().manual_seed(0)
    for slot in range(width):
        for b in range(batch):
            for k in range(1, int(filled[slot, b]) + 1):  # column 0 is this round's
                rings[:, -k, slot, b] = torch.randn(2, size, generator=draw, dtype=torch.float64)
    slope = torch.randn(steps, size, generator=draw, dtype=torch.float64)
    results = []
    for step, where in ((reference, "cpu"), (lambda *a: newton_scan(*a, backend=backend), device)):
        run = given.map(lambda t, where=where: t.clone().to(where))
        held = [t.clone().to(where) for t in (*rings, filled)]
        scan = run.scan()
        step(*scan[:4], slope.to(where), *scan[4:], *held, 0, 1e-6, 1e-5, run.drift)
        results.append([t.cpu() for t in (run.states, run.sq_diff, run.sq_norm, *held)])
    for exact, actual in zip(*results, strict=True):
        close(actual, exact.double(), 1e-10, 1e-10, f"history {history}")


def test_triton_chunks_of_time_do_not_change_bits(problem):
    device = triton_device()
    from deqdiff_fast.kernels.newton_scan import _triton

    steps, size = 6, 20
    given = problem(steps, 2, size, 3, full=True).map(lambda t: t.to(device))
    slope = torch.full((steps, 1), 0.3, device=device)
    runs = []
    for chunks in (1, 3):
        run = given.clone()
        rings = list(torch.linspace(-1, 1, 2 * 3 * steps * 2 * size, device=device).view(2, 3, steps, 2, size))
        filled = torch.full((steps, 2), 2, dtype=torch.int32, device=device)
        scan = run.scan()
        _triton.launch(*scan[:4], slope, *scan[4:], *rings, filled, 1, 1e-6, 1e-5, run.drift, chunks=chunks)
        runs.append([run.states, run.sq_diff, run.sq_norm, *rings])
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("backend", ["cpp", *(["triton"] if INTERPRETED else [])])
def test_bfloat16_storage(backend):
    case = Case(5 if INTERPRETED else 12, 2, 64, dtype=torch.bfloat16)
    expected, got = (
        case.run(reference, torch.float64, 2),
        case.run(lambda *a: newton_scan(*a, backend=backend), torch.bfloat16, 2),
    )
    close(got[0], expected[0], 5e-2)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_without_rings_it_is_the_scan_of_a_linear_model(backend):
    case = Case(30, 2, 50, drift=True)
    states = case.run(lambda *a: newton_scan(*a, backend=backend), torch.float64, 1, history=False)[0]
    x = case.x.double().clone()
    lo = torch.arange(2)
    for b in range(2):
        for i in range(int(lo[b]), 30 - b % 2):
            out = case.predictions[0][i, b].double() + case.slope[i] * x[i, b]
            x[i + 1, b] = case.a[i, 0] * x[i, b] + case.b[i, 0] * out + case.drift[i, b].double()
    assert torch.allclose(states, x, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_without_slope_and_history_it_is_picard(backend):
    case = Case(25, 3, 40, lags=2)
    case.slope.zero_()
    got = case.run(lambda *a: newton_scan(*a, backend=backend), torch.float64, 1)

    def plain(states, e, a, b, slope, lo, hi, diff, norm, *rest):
        ddim_update(states, e, a, b, lo, hi, diff, norm, rest[-1])

    expected = case.run(plain, torch.float64, 1)
    close(got[0], expected[0], 1e-12)
    close(got[1][0], expected[1][0], 1e-12)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_linear_model_is_solved_in_one_round_by_its_own_slope(backend):
    """With J exact the scan is Newton's method on an affine system: one step from anywhere is the solution."""
    g = torch.Generator().manual_seed(0)
    steps, size = 40, 33
    slope = torch.rand(steps, size, generator=g, dtype=torch.float64)
    a, b = torch.full((steps, 1), 1.01, dtype=torch.float64), torch.full((steps, 1), -0.05, dtype=torch.float64)
    x = torch.randn(steps + 1, 1, size, generator=g, dtype=torch.float64)
    serial = [x[0, 0]]
    for i in range(steps):
        serial.append(a[i] * serial[-1] + b[i] * (slope[i] * serial[-1] + 0.3))
    e = (slope * x[:-1, 0] + 0.3)[:, None]
    sums = torch.empty(2, steps, 1, dtype=torch.float64)
    rings = torch.empty(2, 2, steps, 1, size, dtype=torch.float64)
    bounds = torch.tensor([[0], [steps]], dtype=torch.int32)
    filled = torch.zeros(steps, 1, dtype=torch.int32)
    newton_scan(x, e, a, b, slope, *bounds, *sums, *rings, filled, backend=backend)
    assert torch.allclose(x[:, 0], torch.stack(serial), atol=1e-10)


def test_degenerate_history_is_harmless():
    """Identical rounds leave zero steps; they must drop out, not divide by zero."""
    case = Case(15, 2, 30)
    case.predictions = [case.predictions[0]] * 5
    states, sums, _, _ = case.run(lambda *a: newton_scan(*a, backend="cpp"), torch.float32)
    assert states.isfinite().all()
    assert sums[1][3:10, 0].isfinite().all()


def test_opcheck_and_bad_arguments():
    case = Case(6, 2, 8)
    seen = {}
    case.run(lambda *a: seen.update(args=a), torch.float64, 1)
    torch.library.opcheck(torch.ops.deqdiff_fast.newton_scan.default, (*seen["args"], None))
    args = list(seen["args"])
    for position, bad, message in (
        (4, torch.zeros(6), "slope: expected"),
        (9, None, "all three or none"),
        (9, torch.zeros(9, 6, 2, 8, dtype=torch.float64), "z: expected shape"),
        (11, torch.zeros(6, 2), "filled: expected dtype int32"),
        (12, 4, "column: expected"),
        (13, 0.0, "ridge, floor"),
    ):
        with pytest.raises(ValueError, match=message):
            newton_scan(*[bad if k == position else a for k, a in enumerate(args)])
