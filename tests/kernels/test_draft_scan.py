"""draft_scan, after draft_secants: sweeps of a draft along the chain, against the float64 reference and the formula."""

from __future__ import annotations

import os

import pytest
import torch

from deqdiff_fast.errors import BackendUnavailableError
from deqdiff_fast.kernels import (
    available_backends,
    draft_scan,
    draft_scan_bytes,
    draft_secants,
    draft_secants_bytes,
    newton_scan,
)
from deqdiff_fast.kernels.draft_scan.reference import draft_scan as scan_reference
from deqdiff_fast.kernels.draft_secants.reference import draft_secants as secants_reference

NAN = float("nan")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
EXACT = (secants_reference, scan_reference)


class Case:
    """A chain with a first guess and some rounds; what must not be read is NaN. Sample b is solved from row b on."""

    def __init__(
        self, steps, size, stride, lags=1, batch=2, history=3, dtype=torch.float32, spectral=True, drift=False,
        narrow=0, device="cpu",
    ):  # fmt: skip
        g = torch.Generator().manual_seed(steps * 131 + size + lags)

        def draw(*shape):
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        early = torch.arange(steps)[:, None] >= torch.arange(lags)[None]
        self.a = torch.where(early, 0.9 / lags + 0.02 * draw(steps, lags), 0)
        self.b = torch.where(early, 0.1 * draw(steps, lags), 0)
        self.slope = 0.5 * draw(steps, size if spectral else 1)
        self.weights = 0.3 * draw(steps, 2)
        self.anchor_rows = sorted({*range(0, steps, stride), *range(max(steps - 2, 0), steps)})
        self.x, self.drift = draw(steps + 1, batch, size), (0.1 * draw(steps, batch, size) if drift else None)
        self.rounds = [draw(steps, batch, size) for _ in range(history + 2)]
        self.draft_output = [draw(batch, size) for _ in range(7)]
        self.draft_output[2][0, 0], self.draft_output[3][-1, -1] = NAN, -1e7
        self.steps, self.batch, self.size, self.ring, self.dtype = steps, batch, size, history + 1, dtype
        self.lo = torch.arange(batch, dtype=torch.int32).clamp(max=steps)
        self.hi = torch.maximum(self.lo, steps - narrow * torch.arange(batch, dtype=torch.int32))
        self.device = device

    def run(self, secants, scan, dtype, tables=torch.float64, **given):
        """Everything that was written, after a first guess and all rounds."""
        put = lambda t: None if t is None else t.to(dtype).to(self.device)  # noqa: E731
        table = lambda t: t.to(tables).to(self.device)  # noqa: E731
        count, real = len(self.anchor_rows), torch.float32 if dtype != torch.float64 else dtype
        shape = (count, self.batch, self.size)
        empty = lambda *s, kind=dtype: torch.full(s, NAN, dtype=kind, device=self.device)  # noqa: E731
        states, draft_cache, correction = put(self.x).clone(), empty(*shape), empty(2, *shape[1:])
        z, remainder = empty(self.ring, *shape), empty(self.ring, *shape)
        filled = torch.zeros(shape[:2], dtype=torch.int32, device=self.device)
        secant_weights = empty(*shape[:2], self.ring - 1, self.ring - 1, kind=torch.float64)
        carry = empty(2, self.a.shape[1], *shape[1:], kind=real)
        sums = [empty(self.steps, self.batch, kind=tables) for _ in range(2)]
        anchor_rows = torch.tensor(self.anchor_rows, device=self.device)
        lo, hi = self.lo.to(self.device), self.hi.to(self.device)
        low, high = int(self.lo.min()), int(self.hi.max())
        for b in range(self.batch):
            states[int(hi[b]) + 1 :, b] = NAN
        fixed = [table(self.weights), table(self.a), table(self.b), put(self.slope).to(real), lo, hi]
        for k, e in enumerate([self.rounds[0], *self.rounds]):
            e = put(e).clone()
            for b in range(self.batch):
                e[int(hi[b]) :, b] = NAN
                if k == 0:
                    e[int(lo[b]) :, b] = NAN
            column = (k - 1) % self.ring
            if k:
                secants(
                    states,
                    e,
                    draft_cache,
                    anchor_rows,
                    lo,
                    hi,
                    z,
                    remainder,
                    filled,
                    secant_weights,
                    column,
                    1e-6,
                    1e-5,
                    **given,
                )
            for n, start in enumerate(self.anchor_rows):
                stop, previous_start = ([*self.anchor_rows, self.steps])[n + 1], self.anchor_rows[n - 1] if n else -1
                draft_output = put(self.draft_output[(k + n) % 7]) if low <= start < high else None
                scan(
                    states, e, draft_output, draft_cache, correction, *fixed, *sums, carry, z, remainder,
                    secant_weights, column, n, previous_start, start, stop, rollout=k == 0, last=stop == self.steps,
                    drift=put(self.drift), **given,
                )  # fmt: skip
        return {"states": states, "sq_diff": sums[0], "sq_norm": sums[1], "draft_cache": draft_cache, "z": z,
                "remainder": remainder, "filled": filled, "secant_weights": secant_weights}  # fmt: skip

    def on(self, backend, dtype=None, wrap=lambda op: op):
        """`run` on a backend; tables and sums in float32 where a GPU wants them."""
        dtype, device = dtype or self.dtype, torch.device(self.device)
        history = self.ring - 1
        size = max(
            draft_scan_bytes(self.steps, self.batch, self.size, history, dtype, device, backend),
            draft_secants_bytes(len(self.anchor_rows), self.batch, self.size, history, dtype, device, backend),
        )
        slab = torch.full((size + 512,), 0xFF, dtype=torch.uint8, device=device)  # NaN in every floating-point type
        tables = torch.float64 if backend != "triton" or INTERPRETED or dtype == torch.float64 else torch.float32
        ops = (wrap(draft_secants), wrap(draft_scan))
        found = self.run(*ops, dtype, tables, workspace=slab[:size], backend=backend)
        assert bool((slab[size:] == 0xFF).all()), "beyond the workspace"
        assert (size > 0) == (backend == "triton")
        return found


def close(got, expected, tolerance):
    for name, value in expected.items():
        found, value = got[name].double().cpu(), value.double()
        assert torch.equal(found.isnan(), value.isnan()), name
        known = ~value.isnan()
        if known.any():
            scale = value[known].abs().max().clamp_min(1e-30)
            assert (found[known] - value[known]).abs().max() <= tolerance * scale, name


def tolerances(dtype):
    return {torch.float64: 1e-9, torch.float32: 3e-4, torch.bfloat16: 0.1}[dtype]


@pytest.mark.parametrize("steps", [1, 2, 63, 100])
@pytest.mark.parametrize("size", [17, 1000, 4099])
@pytest.mark.parametrize("spectral", [True, False])
def test_cpp_matches_reference(steps, size, spectral):
    case = Case(steps, size, 4, spectral=spectral, narrow=3, history=2 if size > 1000 else 3)
    expected = case.run(*EXACT, torch.float64)
    for dtype in (torch.float64, torch.float32):
        close(case.on("cpp", dtype), expected, tolerances(dtype))


@pytest.mark.parametrize("lags", [1, 2, 3, 11])
@pytest.mark.parametrize("stride", [1, 3, 20])
@pytest.mark.parametrize("history", [0, 1, 7])
def test_cpp_of_lags_strides_and_histories(lags, stride, history):
    case = Case(20, 33, stride, lags, batch=3, history=history, drift=True, narrow=2, dtype=torch.float64)
    close(case.on("cpp"), case.run(*EXACT, torch.float64), 1e-8)


def test_cpp_of_few_bits():
    """bfloat16 throughout: the formula holds to its rounding, of which the secants make more."""
    case = Case(12, 65, 3, history=0, dtype=torch.bfloat16)
    expected = case.run(*EXACT, torch.bfloat16)
    got = case.on("cpp")
    for name in ("states", "draft_cache", "remainder"):
        torch.testing.assert_close(got[name], expected[name], rtol=0.05, atol=0.05, equal_nan=True)


TRITON_CASES = [  # steps, size, stride, lags, history, slope per element, drift, dtype
    (1, 17, 1, 1, 3, True, False, torch.float64),
    (7, 70, 3, 1, 3, True, True, torch.float64),
    (7, 70, 4, 2, 1, False, False, torch.float64),
    (5, 17, 2, 4, 7, True, True, torch.float64),
    (6, 17, 1, 3, 0, False, True, torch.float32),
    (7, 131, 20, 1, 2, True, False, torch.float32),
    (6, 130, 3, 1, 2, False, False, torch.bfloat16),
]


@pytest.mark.parametrize("backend", ["triton"])
@pytest.mark.parametrize(
    ("steps", "size", "stride", "lags", "history", "spectral", "drift", "dtype"), TRITON_CASES
)  # fmt: skip
def test_triton_matches_reference(backend, steps, size, stride, lags, history, spectral, drift, dtype):
    status = available_backends()["triton"]
    if status != "available":
        pytest.skip(status)
    case = Case(
        steps, size, stride, lags, history=history, dtype=dtype, spectral=spectral, drift=drift, narrow=1,
        device="cpu" if INTERPRETED else "cuda",
    )  # fmt: skip
    got = case.on(backend)
    case.device = "cpu"
    expected = case.run(*EXACT, torch.float64)
    if dtype == torch.bfloat16:
        expected = {name: expected[name] for name in ("states", "draft_cache", "remainder")}
    close(got, expected, tolerances(dtype))


def strided(op):
    """The op on twins of its tensors that are not dense, whose values are then taken back."""

    def call(*args, **kwargs):
        twins = [torch.stack([t, t], -1)[..., 0] if isinstance(t, torch.Tensor) else t for t in args]
        op(*twins, **kwargs)
        for given, twin in zip(args, twins):
            if isinstance(given, torch.Tensor):
                given.copy_(twin)

    return call


@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_triton_and_cpp_take_tensors_that_are_not_dense(backend):
    status = available_backends()[backend]
    if status != "available":
        pytest.skip(status)
    case = Case(
        7, 33, 3, 2, history=1, drift=True, narrow=1, device="cpu" if INTERPRETED or backend == "cpp" else "cuda"
    )
    expected, got = (case.on(backend, wrap=wrap) for wrap in (lambda op: op, strided))
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=0, equal_nan=True)


def test_half_precision_is_served_by_the_reference():
    case = Case(6, 17, 2, history=0, dtype=torch.float16)
    expected, got = case.run(*EXACT, torch.float16), case.on("auto")
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("history", [0, 3])
def test_cpp_gives_the_same_bits_on_any_number_of_threads(history):
    case, before = Case(40, 9001, 4, batch=2, history=history), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(case.on("cpp"))
    finally:
        torch.set_num_threads(before)
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=0, atol=0, equal_nan=True)


def chain(steps=12, size=33, stride=1, secants=0):
    """Arguments of one sweep from row 0 on, in float64, without noise."""
    case = Case(steps, size, stride, history=secants, dtype=torch.float64, batch=1)
    lo, hi = torch.zeros(1, dtype=torch.int32), torch.full((1,), steps, dtype=torch.int32)
    return case, lo, hi


def sweep(case, lo, hi, states, predictions, draft, ask=None, rollout=False, backend="auto"):
    """One sweep without secants where `draft(i, x)` is the draft's output."""
    draft_cache, shape = torch.zeros(len(case.anchor_rows), 1, case.size).double(), (1, case.size)
    for n, i in enumerate(case.anchor_rows):
        draft_cache[n] = draft(i, states[i])
    correction, carry = (torch.full((2, *s), NAN).double() for s in (shape, (1, *shape)))
    z, remainder = torch.zeros(1, *draft_cache.shape).double(), torch.zeros(1, *draft_cache.shape).double()
    filled, secant_weights = (
        torch.zeros(len(case.anchor_rows), 1).int(),
        torch.zeros(len(case.anchor_rows), 1, 0, 0).double(),
    )
    sums = [torch.full((case.steps, 1), NAN).double() for _ in range(2)]
    draft_secants(
        states, predictions, draft_cache, torch.tensor(case.anchor_rows), lo, hi, z, remainder, filled, secant_weights,
        0, backend=backend,
    )  # fmt: skip
    starts = [-1, *case.anchor_rows, case.steps]
    for n, start in enumerate(case.anchor_rows):
        draft_output = (ask or draft)(start, states[start])
        draft_scan(
            states, predictions, draft_output, draft_cache, correction, case.weights, case.a, case.b,
            case.slope, lo, hi, *sums, carry, z, remainder, secant_weights, 0, n, starts[n], start,
            starts[n + 2],
            rollout=rollout, backend=backend,
        )  # fmt: skip
    return sums


@pytest.mark.parametrize("stride", [1, 4])
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_a_chain_that_is_solved_stays(stride, backend):
    """The fixed point is the serial chain, whatever the draft and the weights are."""
    case, lo, hi = chain(stride=stride)
    states, predictions = torch.zeros(13, 1, 33).double(), torch.zeros(12, 1, 33).double()
    states[0] = case.x[0, :1]
    for i in range(12):
        predictions[i] = torch.sin(2 * states[i])
        states[i + 1] = case.a[i, 0] * states[i] + case.b[i, 0] * predictions[i]
    before = states.clone()
    sums = sweep(case, lo, hi, states, predictions, lambda i, x: 5 * torch.cos(3 * x) + i, backend=backend)
    torch.testing.assert_close(states, before, rtol=1e-12, atol=1e-12)
    assert float(sums[0].max()) < 1e-20


def test_a_draft_that_is_the_model_solves_at_once():
    case, lo, hi = chain()
    case.weights = torch.tensor([[0.0, 1.0]]).double().repeat(12, 1)
    model = lambda i, x: torch.tanh(x + 0.1 * i)  # noqa: E731
    states = case.x[:, :1].clone()
    serial = [states[0]]
    for i in range(12):
        serial.append(case.a[i, 0] * serial[-1] + case.b[i, 0] * model(i, serial[-1]))
    predictions = torch.stack([model(i, states[i]) for i in range(12)])
    sums = sweep(case, lo, hi, states, predictions, model)
    torch.testing.assert_close(states, torch.stack(serial))
    assert float(sums[0].min()) > 1e-6  # and says how far that was
    rolled_out = case.x[:, :1].clone()
    sweep(case, lo, hi, rolled_out, torch.full_like(predictions, NAN), model, rollout=True)
    torch.testing.assert_close(rolled_out, torch.stack(serial))


def test_a_linear_draft_is_a_newton_scan():
    """A draft that is the slope adds nothing to it."""
    case, lo, hi = chain()
    states, predictions = case.x[:, :1].clone(), case.rounds[0][:, :1].clone()
    other = states.clone()
    sums = sweep(case, lo, hi, states, predictions, lambda i, x: case.slope[i] * x)
    rings = (torch.zeros(1, 12, 1, 33).double(), torch.zeros(1, 12, 1, 33).double(), torch.zeros(12, 1).int())
    expected = [torch.zeros(12, 1).double() for _ in range(2)]
    newton_scan(other, predictions, case.a, case.b, case.slope, lo, hi, *expected, *rings)
    torch.testing.assert_close(states, other)
    torch.testing.assert_close(sums[0], expected[0])
    torch.testing.assert_close(sums[1], expected[1])


def test_secants_know_a_linear_remainder():
    """As many secants as the remainder has directions: the sweep is exact though the draft is zero."""
    case, lo, hi = chain(steps=6, size=8, secants=2)
    case.weights = torch.tensor([[0.0, 1.0]]).double().repeat(6, 1)
    g = torch.Generator().manual_seed(0)
    left, right = (torch.randn(8, 2, generator=g).double() for _ in range(2))
    slope = torch.zeros(6, 1).double()
    model = lambda x: 0.3 * (x @ right) @ left.T  # noqa: E731
    count, shape = 6, (6, 1, 8)
    z, remainder = torch.zeros(3, *shape).double(), torch.zeros(3, *shape).double()
    filled, secant_weights = torch.zeros(6, 1).int(), torch.zeros(6, 1, 2, 2).double()
    anchor_rows, draft_cache, zero = torch.arange(6), torch.zeros(shape).double(), torch.zeros(1, 8).double()
    correction, carry = torch.zeros(2, 1, 8).double(), torch.zeros(2, 1, 1, 8).double()
    start, basis = case.x[0, :1], [torch.randn(8, generator=g).double() for _ in range(2)]
    serial = [start]
    for i in range(6):
        serial.append(case.a[i, 0] * serial[-1] + case.b[i, 0] * model(serial[-1]))
    serial = torch.stack(serial)
    for k in range(3):  # iterates that differ from the chain within the plane of two directions that the model sees
        states = serial.clone()
        if k < 2:
            states[1:] += basis[k]
        else:
            states[1:] += 0.5 * basis[0] - 0.25 * basis[1]
        predictions = torch.stack([model(x) for x in states[:-1]])
        draft_secants(
            states, predictions, draft_cache, anchor_rows, lo, hi, z, remainder, filled, secant_weights, k, ridge=1e-12
        )
    for n in range(count):
        sums = [torch.zeros(6, 1).double() for _ in range(2)]
        draft_scan(
            states, predictions, zero, draft_cache, correction, case.weights, case.a, case.b, slope, lo, hi,
            *sums, carry, z, remainder, secant_weights, 2, n, n - 1, n, n + 1,
        )  # fmt: skip
        torch.testing.assert_close(states[n + 1], serial[n + 1], rtol=1e-6, atol=1e-6)


def arguments(lags=2):
    case = Case(6, 9, 2, lags, dtype=torch.float64, history=2)
    count = len(case.anchor_rows)
    shape = (count, 2, 9)
    return {
        "states": case.x, "predictions": case.rounds[0], "draft_output": case.draft_output[0],
        "draft_cache": torch.zeros(shape).double(), "correction": torch.zeros(2, 2, 9).double(),
        "weights": case.weights, "state_coef": case.a, "model_coef": case.b, "slope": case.slope,
        "lo": case.lo, "hi": case.hi, "sq_diff": torch.zeros(6, 2).double(),
        "sq_norm": torch.zeros(6, 2).double(), "carry": torch.zeros(2, lags, 2, 9).double(),
        "z": torch.zeros(3, *shape).double(), "remainder": torch.zeros(3, *shape).double(),
        "secant_weights": torch.zeros(count, 2, 2, 2).double(), "column": 1, "anchor": 0, "previous_start": -1,
        "start": 0, "stop": 2,
    }  # fmt: skip


def test_opcheck():
    scan = arguments()
    op = torch.ops.deqdiff_fast.draft_scan.default
    torch.library.opcheck(op, (*scan.values(), False, True, torch.zeros(6, 2, 9).double(), None))
    scan["draft_output"] = None
    torch.library.opcheck(op, (*(scan | {"lo": scan["hi"]}).values(), True, True, None, None))


WRONG = {
    "draft_output": torch.zeros(2, 9), "draft_cache": torch.zeros(2, 9).double(),
    "correction": torch.zeros(3, 2, 9).double(), "weights": torch.zeros(6, 3), "slope": torch.zeros(5, 1),
    "carry": torch.zeros(2, 2, 2, 9),
    "z": torch.zeros(9, 4, 2, 9).double(), "remainder": torch.zeros(2, 4, 2, 9).double(),
    "secant_weights": torch.zeros(4, 2, 2, 2), "column": 3, "anchor": 4, "previous_start": 0, "start": 3, "stop": 7,
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_refused(name):
    scan = arguments()
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        draft_scan(**scan | {name: WRONG[name]})


def test_what_else_is_refused():
    scan = arguments()
    with pytest.raises(ValueError, match="draft_output: expected the draft's output, for sample 0"):
        draft_scan(**scan | {"draft_output": None}, backend="cpp")
    if available_backends()["triton"] == "available":
        with pytest.raises(ValueError, match=r"workspace: expected one of draft_scan_bytes"):
            draft_scan(**scan, backend="triton")
    else:
        with pytest.raises(BackendUnavailableError, match="triton"):
            draft_scan(**scan, backend="triton")
