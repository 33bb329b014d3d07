"""Registration: the ops as torch sees them, the choice of backend, and the checks on arguments."""

from __future__ import annotations

import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from deqdiff_fast import kernels
from deqdiff_fast.errors import BackendUnavailableError
from deqdiff_fast.kernels import _backends, anderson_step, available_backends, ddim_update, mark_converged, newton_scan

KEYWORDS = {"scope": "triangular", "ridge": 1e-3, "relative_ridge": True, "damping": 0.9, "stale": math.inf}
FOLDERS = [file.parent.name for file in Path(kernels.__file__).parent.glob("*/__init__.py")]
OPS = [getattr(torch.ops.deqdiff_fast, folder).default for folder in sorted(FOLDERS)]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture
def scan(problem):
    return problem(9, 2, 33, 2)


@pytest.fixture
def round_(problem):
    run = problem(9, 2, 33, 2, dtype=torch.float64, history=3)
    anderson_step(*run.scan(), *run.history, 0, **KEYWORDS, drift=run.drift)
    return run


def test_opcheck_ddim_update(scan):
    torch.library.opcheck(torch.ops.deqdiff_fast.ddim_update.default, (*scan.scan(), scan.drift, None))
    torch.library.opcheck(torch.ops.deqdiff_fast.ddim_update.default, (*scan.scan(), None, None))


def test_opcheck_with_a_workspace(scan, round_):
    workspace = torch.zeros(1 << 16, dtype=torch.uint8)
    torch.library.opcheck(torch.ops.deqdiff_fast.ddim_update.default, (*scan.scan(), scan.drift, workspace))
    arguments = (*round_.scan(), *round_.history, 1, *KEYWORDS.values(), round_.drift, workspace)
    torch.library.opcheck(torch.ops.deqdiff_fast.anderson_step.default, arguments)
    a = round_.scan()
    arguments = (*a[:4], torch.zeros(9, 1), *a[4:], None, None, None, 0, 1e-6, 1e-5, round_.drift, workspace)
    torch.library.opcheck(torch.ops.deqdiff_fast.newton_scan.default, arguments)


def test_no_argument_has_a_default():
    """Torch 2.6 to 2.12 fail on defaults of mutable arguments under dispatch modes, FlopCounterMode for one."""
    for operation in OPS:
        assert not [a.name for a in operation._schema.arguments if a.has_default_value()], operation


def test_a_round_under_a_dispatch_mode(scan, round_):
    with FlopCounterMode(display=False):
        ddim_update(*scan.scan(), scan.drift)
        anderson_step(*round_.scan(), *round_.history, 1, **KEYWORDS, drift=round_.drift)
        newton_scan(*round_.scan()[:4], torch.zeros(9, 1), *round_.scan()[4:], drift=round_.drift)


def test_opcheck_anderson_step(round_):
    arguments = (*round_.scan(), *round_.history, 1, *KEYWORDS.values(), round_.drift, None)
    torch.library.opcheck(torch.ops.deqdiff_fast.anderson_step.default, arguments)


def test_torch_compile(scan, round_):
    """One graph, through the default compiler, whose result and side effects are those of the plain call."""

    def step(a, drift, b, history, other):
        ddim_update(*a, drift)
        anderson_step(*b, *history, 1, **KEYWORDS, drift=other)
        return a[0] * 2, b[0].nan_to_num().sum()

    plain, compiled = [(scan.clone(), round_.clone()) for _ in range(2)]
    expected = step(plain[0].scan(), plain[0].drift, plain[1].scan(), plain[1].history, plain[1].drift)
    function = torch.compile(step, fullgraph=True)
    actual = function(compiled[0].scan(), compiled[0].drift, compiled[1].scan(), compiled[1].history, compiled[1].drift)
    for one, two in zip(expected, actual, strict=True):
        torch.testing.assert_close(one, two, equal_nan=True)
    for one, two in zip(plain, compiled, strict=True):
        for a, b in zip((*one.scan(), *one.history), (*two.scan(), *two.history), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert not torch.equal(compiled[1].states.nan_to_num(), round_.states.nan_to_num())  # it did work in place


def test_torch_compile_of_a_quasi_newton_round(scan):
    """With a workspace, which only a GPU writes to, and the marking of converged rows: one graph, the same numbers."""
    workspace, slope, scan.drift = torch.zeros(4096, dtype=torch.uint8), torch.full((9, 1), 0.1), None

    def step(a, previous, strict):
        newton_scan(*a[:4], slope, *a[4:], workspace=workspace)
        mark_converged(a[6], a[7], previous, strict, 1e-3, 1e-6)
        return a[0].nan_to_num().sum()

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        run, previous = scan.clone(), torch.full((9, 2), math.nan, dtype=scan.sq_diff.dtype)
        results.append((function(run.scan(), previous, torch.ones_like(previous[0])), previous, *run.scan()))
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)
    assert not torch.equal(results[1][2].nan_to_num(), scan.states.nan_to_num())


def test_auto_logs_its_choice_once(scan, caplog):
    _backends._announce.cache_clear()
    with caplog.at_level(logging.INFO, logger="deqdiff_fast"):
        for _ in range(3):
            ddim_update(*scan.scan(), scan.drift)
    lines = [r.getMessage() for r in caplog.records if "serves cpu tensors" in r.getMessage()]
    assert len(lines) == 1
    expected = "cpp" if available_backends()["cpp"] == "available" else "reference"
    assert repr(expected) in lines[0]


def test_auto_falls_back_where_cpp_stores_no_such_dtype(problem):
    run = problem(5, 1, 17, dtype=torch.float16)
    assert _backends.resolve("auto", (run.states, run.predictions)) == "reference"


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="triton is available here")
def test_unavailable_backend_says_what_to_do(scan):
    assert "TRITON_INTERPRET" in available_backends()["triton"] or "install" in available_backends()["triton"]
    with pytest.raises(BackendUnavailableError, match=r"triton.*(TRITON_INTERPRET|install)"):
        ddim_update(*scan.scan(), scan.drift, backend="triton")


def test_every_backend_is_listed():
    assert set(available_backends()) == set(_backends.BACKENDS) - {"auto"}
    assert available_backends()["reference"] == "available"


def replaced(run, name, value):
    if name in ("f", "g", "gram", "filled"):
        at = ("f", "g", "gram", "filled").index(name)
        run.history = (*run.history[:at], value(run.history[at]), *run.history[at + 1 :])
    else:
        setattr(run, name, value(getattr(run, name)))
    return run


SCAN_MISTAKES = {
    "states": [lambda t: t[0], lambda t: t[:1], lambda t: t.int(), lambda t: t[..., :0]],
    "predictions": [lambda t: t[1:], lambda t: t.long(), lambda t: t.to("meta")],
    "state_coef": [lambda t: t[:, 0], lambda t: t.repeat(1, 9), lambda t: t.half()],
    "model_coef": [lambda t: t[:, :1], lambda t: t[1:]],
    "lo": [lambda t: t.long(), lambda t: t[:1]],
    "hi": [lambda t: t.float(), lambda t: t[:, None]],
    "sq_diff": [lambda t: t.T, lambda t: t.half()],
    "sq_norm": [lambda t: t[0], lambda t: t.to("meta")],
    "drift": [lambda t: t[0], lambda t: t.int()],
}
HISTORY_MISTAKES = {
    "f": [lambda t: t[0], lambda t: t.repeat(3, 1, 1, 1), lambda t: t[:, :, :1], lambda t: t.int()],
    "g": [lambda t: t[:2], lambda t: t.int()],
    "gram": [lambda t: t[0], lambda t: t.half()],
    "filled": [lambda t: t.T, lambda t: t.long()],
}


@pytest.mark.parametrize("name", SCAN_MISTAKES)
def test_wrong_tensors_are_refused_by_name(name, scan):
    for mistake in SCAN_MISTAKES[name]:
        run = replaced(scan.clone(), name, mistake)
        with pytest.raises(ValueError, match=rf"^{name}: expected .* got "):
            ddim_update(*run.scan(), run.drift)


@pytest.mark.parametrize("name", HISTORY_MISTAKES)
def test_wrong_histories_are_refused_by_name(name, round_):
    for mistake in HISTORY_MISTAKES[name]:
        run = replaced(round_.clone(), name, mistake)
        with pytest.raises(ValueError, match=rf"^{name}: expected .* got "):
            anderson_step(*run.scan(), *run.history, 1, **KEYWORDS, drift=run.drift)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("column", 3),
        ("column", -1),
        ("scope", "row"),
        ("ridge", -1.0),
        ("ridge", math.nan),
        ("ridge", math.inf),
        ("damping", math.nan),
        ("stale", math.nan),
        ("stale", -1.0),
        ("backend", "cuda"),
    ],
)
def test_wrong_settings_are_refused_by_name(name, value, round_):
    settings = KEYWORDS | {"column": 1, name: value}
    with pytest.raises(ValueError, match=rf"^{name}: expected .* got {value!r}"):
        anderson_step(*round_.scan(), *round_.history, **settings, drift=round_.drift)


@pytest.mark.parametrize(("lo", "hi"), [(-1, 3), (0, 10), (4, 3)])
def test_windows_outside_the_chain_are_refused(backend, lo, hi, scan):
    if torch.cuda.is_available() and backend == "triton":
        pytest.skip("windows on a GPU are clamped, not read back")
    scan.lo[1], scan.hi[1] = lo, hi
    with pytest.raises(ValueError, match=r"lo, hi: expected 0 <= lo <= hi <= 9, got .* sample 1"):
        ddim_update(*scan.scan(), scan.drift, backend=backend)


def test_window_wider_than_the_ring_is_refused(problem):
    run = problem(9, 1, 33, history=2, width=4)
    run.hi[0] = 9
    with pytest.raises(ValueError, match="at most W = 4 active rows, got 9"):
        anderson_step(*run.scan(), *run.history, 0, **KEYWORDS)


def test_neither_triton_nor_the_extension_is_needed():
    """A process in which both imports fail still has the reference, and says why the others are missing."""
    program = """
import sys
sys.modules["triton"] = None
sys.modules["deqdiff_fast._C"] = None
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else real(name, *rest)
import torch
from deqdiff_fast import kernels
status = kernels.available_backends()
assert status["cpp"] != "available" and "pip install" in status["cpp"], status
assert status["triton"] != "available" and "pip install" in status["triton"], status
x, e, c = torch.ones(3, 1, 4), torch.ones(2, 1, 4), torch.ones(2, 1, dtype=torch.float64)
sums = torch.zeros(2, 1, dtype=torch.float64)
window = torch.tensor([0], dtype=torch.int32), torch.tensor([2], dtype=torch.int32)
kernels.ddim_update(x, e, c, c, *window, sums, sums.clone())
assert x[2, 0, 0] == 3, x
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
