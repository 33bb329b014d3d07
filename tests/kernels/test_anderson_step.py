"""One Anderson round on every backend against the float64 reference, round after round."""

from __future__ import annotations

import os

import pytest
import torch

from deqdiff_fast.errors import BackendUnavailableError
from deqdiff_fast.kernels import anderson_step
from deqdiff_fast.kernels.anderson_step.reference import anderson_step as reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
INF = float("inf")
PLAIN = {"ridge": 1e-3, "relative_ridge": True, "damping": 1.0, "stale": INF}
SCOPES = ["timestep", "trajectory", "triangular"]
SETTINGS = {
    "relative": {},
    "absolute": {"ridge": 0.5, "relative_ridge": False},
    "no_ridge": {"ridge": 0.0},
    "damped": {"damping": 0.7},
    "stale": {"stale": 1.5},
    "all": {"ridge": 2.0, "relative_ridge": False, "damping": 1.3, "stale": 1.5},
}
SIZES = {
    "1x1x17": (1, 1, 17, 1, 1),
    "2x3x1000": (2, 3, 1000, 2, 2),
    "63x2x3073": (63, 2, 3073, 3, 2),
    "100x3x130": (100, 3, 130, 1, 8),
}


def advance(run, column, backend, **settings):
    anderson_step(*run.scan(), *run.history, column, **(PLAIN | settings), drift=run.drift, backend=backend)


def advance_truth(run, column, scope, **settings):
    reference(*run.scan(), *run.history, column, scope, *(PLAIN | settings).values(), drift=run.drift)


def new_predictions(run, number):
    """What the model might answer next: correlated with before, so that the Grams are neither diagonal nor singular."""
    draw = torch.Generator().manual_seed(100 + number)
    fresh = torch.randn(run.predictions.shape, generator=draw, dtype=torch.float64).to(run.predictions.device)
    run.predictions.copy_(0.5 * run.predictions.double() + 0.5 * fresh)


def check_round(run, truth, close, weights_amplify=1.0):
    """Everything that a round writes. Tolerances are in units of the storage's last place, for values of order one.

    The weights amplify the rounding of Gram entries, the more the less ridge there is; hence the room for states.
    """
    eps = torch.finfo(run.states.dtype).eps
    half = run.states.dtype in (torch.bfloat16, torch.float16)
    f, g, gram, filled = run.history
    exact_f, exact_g, exact_gram, exact_filled = truth.history
    close(f, exact_f, 8 * eps, 16 * eps, "f")
    close(g, exact_g, 8 * eps, 24 * eps, "g")
    residual = torch.diagonal(exact_gram, dim1=2, dim2=3).nan_to_num().amax().item()
    close(gram, exact_gram, 0.0, (8 if half else 64) * eps * residual, "gram")
    close(run.sq_diff, truth.sq_diff, (8 if half else 64) * eps, 0.0, "sq_diff")
    close(run.sq_norm, truth.sq_norm, (8 if half else 64) * eps, 0.0, "sq_norm")
    assert torch.equal(filled.cpu(), exact_filled)
    close(run.states, truth.states, 8 * eps, (16 if half else 256 * weights_amplify) * eps, "states")


def run_rounds(run, rounds, scope, backend, close, **settings):
    """Each round starts from the backend's own numbers, so that one round's rounding is all that is compared."""
    history = run.history[0].shape[0]
    for number in range(rounds):
        truth = run.exact()
        advance_truth(truth, number % history, scope, **settings)
        advance(run, number % history, backend, scope=scope, **settings)
        check_round(run, truth, close)
        new_predictions(run, number)


@pytest.mark.parametrize(
    ("setting", "scope"),
    [(n, s) for i, n in enumerate(SETTINGS) for j, s in enumerate(SCOPES) if not INTERPRETED or (i + j) % 3 == 0],
)
def test_equals_float64(backend, setting, scope, problem, small, close):
    steps, size = small(20, 257)
    run = problem(steps, 2, size, 2, dtype=torch.float64, history=3, width=steps - 1, drift=setting != "damped")
    run_rounds(run.serve(backend), 2 if INTERPRETED else 5, scope, backend, close, **SETTINGS[setting])


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(case, dtype, id=f"{case}-{str(dtype)[6:]}")
        for i, case in enumerate(SIZES)
        for j, dtype in enumerate((torch.float32, torch.float64, torch.bfloat16, torch.float16))
        if not INTERPRETED or (i + j) % 2 == 0
    ],
)
def test_sizes_and_dtypes(backend, case, dtype, problem, small, close):
    steps, batch, size, lags, history = SIZES[case]
    steps, size = small(min(steps, 20) if backend == "reference" else steps, size)
    run = problem(steps, batch, size, lags, dtype=dtype, history=history).serve(backend)
    scope = SCOPES[(steps + dtype.itemsize) % 3]
    if backend == "cpp" and dtype == torch.float16:
        with pytest.raises(BackendUnavailableError, match="float16"):
            advance(run, 0, backend, scope=scope)
        return
    run_rounds(run, 2 if INTERPRETED else min(history + 2, 4), scope, backend, close)


@pytest.mark.parametrize("scope", SCOPES)
def test_sliding_window(backend, scope, problem, close):
    """A ring narrower than the chain: rows leave at the bottom, their slots are taken over with `filled` at zero."""
    steps, batch, width = (6, 2, 3) if INTERPRETED else (30, 3, 11)
    run = problem(steps, batch, 65, 2, history=3, width=width, full=True).serve(backend)
    draw = torch.Generator().manual_seed(1)
    run.predictions.copy_(torch.randn(run.predictions.shape, generator=draw))
    run.states.copy_(torch.randn(run.states.shape, generator=draw))
    run.drift.copy_(torch.randn(run.drift.shape, generator=draw))
    filled = run.history[3]
    for number in range(3 if INTERPRETED else 9):
        truth = run.exact()
        advance_truth(truth, number % 3, scope)
        advance(run, number % 3, backend, scope=scope)
        check_round(run, truth, close)
        for b in range(batch):
            first = int(run.lo[b]) + 1 + b  # samples move at their own pace
            for row in range(int(run.hi[b]), min(first + width, steps)):
                filled[row % width, b] = 0
            run.lo[b], run.hi[b] = min(first, steps), min(first + width, steps)
            if number == 1:  # an early row may know less than the later ones that share with it
                filled[first % width, b] = 0
        new_predictions(run, number)
    assert int(filled.min()) < int(filled.max())


@pytest.mark.parametrize("scope", SCOPES)
def test_rank_deficient_history(backend, scope, problem, small):
    """Columns equal to, twice, or zero times the newest, no ridge: every F is the same, so any weights give it back."""
    steps, size = small(20, 66 if INTERPRETED else 257)
    multiples = (1.0, 2.0, 0.0) if INTERPRETED else (1.0, 2.0, 0.0, 1.0, 1.0)
    run = problem(steps, 2, size, history=len(multiples), full=True).serve(backend)
    start = run.states.clone()
    plain = run.clone()
    settings = {"scope": scope, "ridge": 0.0, "relative_ridge": True}
    advance(plain, 0, backend, **settings)  # an empty history: the plain step
    residual = plain.states - start
    for number, multiple in enumerate(multiples):
        run.states.copy_(plain.states - multiple * residual)
        advance(run, number, backend, **settings)
        scale = plain.states.abs().max()
        assert (run.states - plain.states).abs().max() <= 1e-4 * scale, f"round {number}"


def test_zero_residual_keeps_the_solution(backend, problem, small):
    steps, size = small(10, 100)
    run = problem(steps, 2, size, history=3, full=True).serve(backend)
    advance(run, 0, backend, scope="timestep")
    for number, scope in enumerate(SCOPES):
        solution = run.states.clone()
        advance(run, (1 + number) % 3, backend, scope=scope)
        assert (run.states - solution).abs().max() <= 1e-6 * solution.abs().max(), scope


@pytest.mark.parametrize("scope", SCOPES)
def test_first_row_takes_the_plain_step(backend, scope, problem, small):
    """Whatever the history says: this is why a round finishes a state for good."""
    steps, size = small(10, 100)
    run = problem(steps, 2, size, history=3).serve(backend)
    for number in range(3):
        before = run.clone()
        advance(run, number, backend, scope=scope, damping=0.5)
        for b, first in enumerate(run.lo.tolist()):
            kept = run.history[0][number, first % steps, b]
            assert torch.equal(run.states[first + 1, b], kept)
            later = run.states[first + 2 : int(run.hi[b]) + 1, b]
            assert number == 0 or not torch.equal(later, run.history[0][number, first + 1 : int(run.hi[b]), b])
        assert not torch.equal(before.states.nan_to_num(), run.states.nan_to_num())
        new_predictions(run, number)


def test_non_contiguous(backend, problem, small, close):
    steps, size = small(8, 66)
    run = problem(steps, 2, size, 2, history=2).serve(backend)

    def strided(t):
        view = torch.empty(*(2 * n for n in t.shape), dtype=t.dtype, device=t.device)
        view = view.transpose(0, -1).contiguous().transpose(0, -1)[tuple(slice(None, None, 2) for _ in t.shape)]
        return view.copy_(t)

    run = run.map(strided)
    assert not any(t.is_contiguous() for t in (*run.scan(), *run.history) if t.numel() > 1)
    run_rounds(run, 2, "triangular", backend, close)


def same_bits(one, two):
    for a, b in zip((*one.scan(), *one.history), (*two.scan(), *two.history), strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize("scope", SCOPES)
def test_same_bits_twice(backend, scope, problem, small):
    if INTERPRETED:
        pytest.skip("the interpreter runs one program after the other")
    steps, size = small(40, 1000)
    run = problem(steps, 2, size, 2, history=3).serve(backend)
    advance(run, 0, backend, scope=scope)
    new_predictions(run, 0)
    twin = run.clone()
    advance(run, 1, backend, scope=scope)
    advance(twin, 1, backend, scope=scope)
    same_bits(run, twin)


def test_chunks_of_time_do_not_change_bits(backend, problem, small):
    if backend != "triton":
        pytest.skip("only the Triton scan is cut into chunks")
    from deqdiff_fast.kernels.anderson_step import _triton

    steps, size = small(30, 257)
    given = problem(steps, 2, size, 2, history=2, full=True).serve(backend)
    runs = [given.clone() for _ in range(2)]
    for run, chunks in zip(runs, (1, 3), strict=True):
        _triton.launch(*run.scan(), *run.history, 0, "timestep", *list(PLAIN.values()), run.drift, chunks=chunks)
    same_bits(*runs)


def test_threads_do_not_change_bits(backend, problem):
    if backend != "cpp":
        pytest.skip("only cpp has threads of its own")
    given = problem(40, 3, 3073, 2, history=3)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            run = given.clone()
            for number in range(3):
                advance(run, number, "cpp", scope="triangular")
                new_predictions(run, number)
            results.append(run)
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        same_bits(results[0], other)


@pytest.mark.parametrize("narrow_f", [True, False], ids=["f and g", "g alone"])
def test_history_narrower_than_states(backend, problem, small, narrow_f):
    """A bfloat16 history costs accuracy in the weights and old columns, never in the newest F."""
    if backend == "cpp":
        pytest.skip("cpp stores one dtype throughout")
    steps, size = small(12, 130)
    narrow = problem(steps, 1, size, history=3, full=True).serve(backend)
    f, g, gram, filled = narrow.history
    narrow.history = (f.bfloat16() if narrow_f else f, g.bfloat16(), gram, filled)
    full = problem(steps, 1, size, history=3, full=True).serve(backend)
    for number in range(3):
        for run in (narrow, full):
            advance(run, number, backend, scope="triangular")
        error = (narrow.states - full.states).norm() / full.states.norm()
        assert error <= (0.0 if number == 0 else 2**-7), f"round {number}"
        assert torch.equal(narrow.states[1], full.states[1])  # the plain step is exact
        full.states.copy_(narrow.states)
        for run in (narrow, full):
            new_predictions(run, number)
