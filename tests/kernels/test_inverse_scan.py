"""inverse_scan: each backend against the float64 reference, and against what the formula promises."""

from __future__ import annotations

import os

import pytest
import torch

from deqdiff_fast.kernels import available_backends, inverse_scan
from deqdiff_fast.kernels.inverse_scan.reference import inverse_scan as reference

NAN = float("nan")
BACKENDS = ["reference", "cpp"]
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


@pytest.fixture(params=BACKENDS)
def backend(request):
    if available_backends()[request.param] != "available":
        pytest.skip(available_backends()[request.param])
    return request.param


class Case:
    """A random chain, windows that differ between samples, everything that must not be read NaN."""

    def __init__(self, steps, batch, size, lags=1, width=None, history=3, spectral=True, drift=False):
        g = torch.Generator().manual_seed(steps * 131 + size)

        def draw(*shape):
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        self.steps, self.batch, self.size, self.width, self.ring = steps, batch, size, width or steps, history + 1
        early = torch.arange(steps)[:, None] >= torch.arange(lags)[None]
        self.a = torch.where(early, 0.9 / lags + 0.02 * draw(steps, lags), 0)
        self.b = torch.where(early, 0.1 * draw(steps, lags), 0)
        self.slope = (0.5 * draw(steps, size if spectral else 1)).float().double()
        self.weight = draw(steps, size if spectral else 1).abs().float().double()
        self.hi = steps - torch.arange(batch, dtype=torch.int32).clamp(max=steps)
        self.lo = (self.hi - self.width).clamp(min=0)
        self.x = draw(steps + 1, batch, size)
        self.drift = 0.1 * draw(steps, batch, size) if drift else None
        # predictions that a smooth model could make, so that secants mean something
        self.bend, self.shift = 0.5 * draw(steps, 1, size), draw(steps, 1, size)

    def predict(self, states):
        return torch.tanh(states[:-1].double() * self.bend + self.shift)

    def run(self, step, dtype, rounds=5, reach=1.0):
        states = self.x.to(dtype).clone()
        rings = [torch.full((self.ring, self.width, self.batch, self.size), NAN, dtype=dtype) for _ in range(2)]
        filled = torch.zeros(self.width, self.batch, dtype=torch.int32)
        miss = torch.full((self.steps, self.batch), NAN, dtype=torch.float64)
        for k in range(rounds):
            e = self.predict(states).to(dtype)
            drift = None if self.drift is None else self.drift.to(dtype)
            step(states, e, self.a, self.b, self.slope, self.weight, self.lo, self.hi, miss, *rings, filled,
                 k % self.ring, 0.9, 1e-6, 8.0, 1e-6, reach, drift)  # fmt: skip
        return states, miss, rings, filled


def close(got, expected, tolerance):
    mask = expected.isnan()
    assert torch.equal(got.isnan(), mask)
    if (~mask).any():
        assert (got[~mask].double() - expected[~mask]).abs().max() <= tolerance * expected[~mask].abs().max()


@pytest.mark.parametrize("steps", [1, 2, 63, 100])
@pytest.mark.parametrize("size", [17, 1000, 3073])
@pytest.mark.parametrize("spectral", [True, False])
def test_matches_reference(backend, steps, size, spectral):
    rounds = 4 if size < 1000 else 3
    case = Case(steps, 2, size, spectral=spectral)
    expected = case.run(reference, torch.float64, rounds)
    for dtype, tolerance in ((torch.float64, 1e-8), (torch.float32, 2e-3)):
        got = case.run(lambda *a: inverse_scan(*a, backend=backend), dtype, rounds)
        close(got[0], expected[0], tolerance)
        close(got[1].sqrt(), expected[1].sqrt(), tolerance)
        for k in range(2):
            close(got[2][k], expected[2][k], tolerance)
        assert torch.equal(got[3], expected[3])


@pytest.mark.parametrize("lags", [1, 2, 3])
@pytest.mark.parametrize("width", [5, 8, 20])
@pytest.mark.parametrize("history", [0, 1, 5, 7])
def test_lags_windows_and_histories(backend, lags, width, history):
    case = Case(20, 3, 100, lags=lags, width=width, history=history, drift=True)
    expected = case.run(reference, torch.float64)
    got = case.run(lambda *a: inverse_scan(*a, backend=backend), torch.float64)
    close(got[0], expected[0], 1e-7)
    close(got[1], expected[1], 1e-7)


def test_the_miss_of_a_chain_is_zero_and_it_stays(backend):
    """States that satisfy every step are a fixed point, whatever slope and history."""
    case = Case(30, 2, 50, drift=True)
    case.lo.zero_(), case.hi.fill_(30)
    x = case.x.clone()
    for i in range(30):
        out = torch.tanh(x[i] * case.bend[i] + case.shift[i])
        x[i + 1] = case.a[i, 0] * x[i] + case.b[i, 0] * out + case.drift[i]
    case.x = x
    states, miss, _, _ = case.run(lambda *a: inverse_scan(*a, backend=backend), torch.float64)
    assert torch.allclose(states, x, atol=1e-9)
    assert miss.max() < 1e-18


def test_a_linear_model_is_inverted_in_one_round_by_its_own_slope(backend):
    g = torch.Generator().manual_seed(0)
    steps, size = 40, 33
    slope = torch.rand(steps, size, generator=g, dtype=torch.float64)
    a, b = torch.full((steps, 1), 1.01, dtype=torch.float64), torch.full((steps, 1), -0.05, dtype=torch.float64)
    x = torch.randn(steps + 1, 1, size, generator=g, dtype=torch.float64)
    e = slope[:, None] * x[:-1] + 0.3
    wanted = [x[-1, 0]]
    for i in reversed(range(steps)):
        wanted.insert(0, (wanted[0] - b[i] * 0.3) / (a[i] + b[i] * slope[i]))
    rings = torch.empty(2, 1, steps, 1, size, dtype=torch.float64)
    bounds = torch.tensor([[0], [steps]], dtype=torch.int32)
    filled, miss = torch.zeros(steps, 1, dtype=torch.int32), torch.empty(steps, 1, dtype=torch.float64)
    weight = torch.ones(steps, 1, dtype=torch.float64)
    inverse_scan(x, e, a, b, slope, weight, *bounds, miss, *rings, filled, 0, reach=1e6, backend=backend)
    assert torch.allclose(x[:, 0], torch.stack(wanted), rtol=1e-9, atol=1e-9)


def test_secants_find_a_dense_linear_model(backend):
    """As many secants as dimensions: one row's linear system is solved without knowing its matrix."""
    g = torch.Generator().manual_seed(1)
    matrix = torch.randn(4, 4, generator=g, dtype=torch.float64)
    x = torch.randn(2, 1, 4, generator=g, dtype=torch.float64)
    target = x[1].clone()
    rings = torch.empty(2, 8, 1, 1, 4, dtype=torch.float64)
    bounds = torch.tensor([[0], [1]], dtype=torch.int32)
    filled, miss = torch.zeros(1, 1, dtype=torch.int32), torch.empty(1, 1, dtype=torch.float64)
    one = torch.ones(1, 1, dtype=torch.float64)
    for k in range(7):
        inverse_scan(x, x[:1] @ matrix.T, one, one, 0 * one, one, *bounds, miss, *rings, filled, k, ridge=1e-14,
                     stale=1e6, floor=0.0, reach=1e3, backend=backend)  # fmt: skip
    assert torch.allclose(x[0] + x[0] @ matrix.T, target, atol=1e-8)


def test_steps_are_bounded_and_never_nan(backend):
    case = Case(15, 2, 30)
    case.slope = -case.a / case.b  # d = 0 up to rounding
    states, _, _, _ = case.run(lambda *a: inverse_scan(*a, backend=backend), torch.float32)
    assert states.isfinite().all()
    case = Case(15, 2, 30)
    case.predict = lambda states: torch.full((15, 2, 30), NAN, dtype=torch.float64)
    states, miss, _, _ = case.run(lambda *a: inverse_scan(*a, backend=backend), torch.float32, 2)
    assert torch.equal(states, case.x.float()), "a step that is not finite is not taken"
    assert miss[3, 0].isnan()


def by_triton(*args):
    """On a GPU, or interpreted (test_interpreted.py)."""
    moved = [t.to(DEVICE) if isinstance(t, torch.Tensor) else t for t in args]
    inverse_scan(*moved, backend="triton")
    for before, after in zip(args, moved, strict=True):
        if isinstance(before, torch.Tensor) and before is not after:
            before.copy_(after)


@pytest.fixture
def triton():
    if available_backends()["triton"] != "available":
        pytest.skip(available_backends()["triton"])


TRITON_CASES = [  # steps, elements, lags, window, history, one weight and slope an element, reach, dtype
    (1, 17, 1, None, 3, False, 1.0, torch.float64),
    (4, 140, 1, None, 3, True, 1.0, torch.float32),
    (6, 30, 3, 4, 7, True, 1.0, torch.float64),
    (5, 30, 2, 3, 0, False, 1.0, torch.float32),
    (3, 30, 1, None, 3, True, 0.1, torch.float64),
    (4, 20, 4, 3, 30, True, 1.0, torch.float32),
]


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize(("steps", "size", "lags", "width", "history", "spectral", "reach", "dtype"), TRITON_CASES)
def test_triton_matches_reference(steps, size, lags, width, history, spectral, reach, dtype):
    """Rings that are not full, NaN in what is not; some steps that are too long."""
    case = Case(steps, 2, size, lags, width, history, spectral, drift=lags == 2)
    expected = case.run(reference, torch.float64, 4, reach)
    got = case.run(by_triton, dtype, 4, reach)
    close(got[0], expected[0], 1e-10 if dtype == torch.float64 else 1e-5)
    close(got[1].sqrt(), expected[1].sqrt(), 1e-10 if dtype == torch.float64 else 1e-4)
    for k in range(2):
        close(got[2][k], expected[2][k], 1e-10 if dtype == torch.float64 else 1e-5)
    assert torch.equal(got[3], expected[3])
    if reach < 1:  # the first round's steps, of which some are as long as they may be
        before, (after, *_) = case.x, case.run(by_triton, torch.float64, 1, reach)
        step = (after - before).norm(dim=2)[:-1]
        limit = reach * torch.maximum(before[:-1].norm(dim=2), after[1:].norm(dim=2))
        assert ((step / limit - 1).abs() < 1e-9).any()


@pytest.mark.usefixtures("triton")
def test_triton_long_histories_are_fitted_in_float64():
    """Though the states are float32: what is left of a row by then is float32's rounding."""
    case = Case(1, 1, 12, history=30)
    expected, got = case.run(reference, torch.float32, 7), case.run(by_triton, torch.float32, 7)
    close(got[0], expected[0].double(), 1e-6)
    assert 0 < expected[1].sqrt().max() < 1e-5
    close(got[1].sqrt(), expected[1].sqrt(), 1e-4)


@pytest.mark.usefixtures("triton")
def test_triton_a_step_that_is_not_finite_is_not_taken():
    case = Case(3, 2, 30)
    case.predict = lambda states: torch.full((3, 2, 30), NAN, dtype=torch.float64)
    states, miss, _, filled = case.run(by_triton, torch.float32, 1)
    assert torch.equal(states, case.x.float())
    assert miss[1, 0].isnan()
    assert filled[:, 0].tolist() == [1, 1, 1]
    case = Case(3, 2, 30)
    case.slope = -case.a / case.b  # d = 0 up to rounding
    assert case.run(by_triton, torch.float32, 2)[0].isfinite().all()


@pytest.mark.usefixtures("triton")
def test_triton_bfloat16_storage():
    case = Case(3, 2, 40)
    expected = case.run(reference, torch.float64, 2)
    close(case.run(by_triton, torch.bfloat16, 2)[0], expected[0], 5e-2)


def test_opcheck_and_bad_arguments():
    case = Case(6, 2, 8)
    seen = {}
    case.run(lambda *a: seen.update(args=a), torch.float64, 1)
    torch.library.opcheck(torch.ops.deqdiff_fast.inverse_scan.default, (*seen["args"], None))
    args = list(seen["args"])
    for position, bad, message in (
        (4, torch.zeros(6), "slope: expected"),
        (5, torch.zeros(5, 1), "weight: expected"),
        (9, torch.zeros(33, 6, 2, 8, dtype=torch.float64), "z: expected shape"),
        (10, torch.zeros(4, 6, 2, 8), "e: expected"),
        (11, torch.zeros(6, 2), "filled: expected dtype int32"),
        (12, 4, "column: expected"),
        (14, 0.0, "damping, ridge, stale, reach"),
        (7, torch.full((2,), 9, dtype=torch.int32), "lo, hi"),
    ):
        with pytest.raises(ValueError, match=message):
            inverse_scan(*[bad if k == position else a for k, a in enumerate(args)])
