"""Scratch memory: an op that is given a workspace allocates nothing, keeps inside of it and computes the same bits."""

from __future__ import annotations

import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import deqdiff_fast as dq
from deqdiff_fast.engine import solve
from deqdiff_fast.kernels import (
    anderson_step,
    anderson_step_bytes,
    available_backends,
    ddim_update,
    ddim_update_bytes,
    inverse_scan,
    inverse_scan_bytes,
    newton_scan,
    newton_scan_bytes,
)
from deqdiff_fast.loop.device import DeviceLoop
from deqdiff_fast.loop.task import Lookahead

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SETTINGS = {"scope": "triangular", "ridge": 1e-3, "relative_ridge": True, "damping": 0.8, "stale": 1e6}
ON = {"backend": "triton"}
FLOAT = torch.float32
GUARD = 512


class Allocations(TorchDispatchMode):
    """Results of at least `size` elements that do not live in the memory of an argument, while `counting`."""

    def __init__(self, size=1):
        super().__init__()
        self.size, self.counting, self.found = size, True, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in tree_leaves(out) if self.counting else ():
            fresh = isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in given
            if fresh and t.numel() >= self.size:
                self.found.append(f"{func} {tuple(t.shape)}")
        return out


@pytest.fixture
def counter(monkeypatch):
    """A counter that does not see what Triton's interpreter does inside of a kernel."""
    status = available_backends()["triton"]
    if status != "available":
        pytest.skip(status)
    if not INTERPRETED:
        return Allocations
    from triton.runtime.interpreter import InterpretedFunction

    run, modes = InterpretedFunction.run, []

    def hidden(self, *args, **kwargs):
        before = [mode.counting for mode in modes]
        for mode in modes:
            mode.counting = False
        out = run(self, *args, **kwargs)
        for mode, counting in zip(modes, before):
            mode.counting = counting
        return out

    monkeypatch.setattr(InterpretedFunction, "run", hidden)

    def make(size=1):
        modes.append(Allocations(size))
        return modes[-1]

    return make


def run_op(op, run, workspace, stored=FLOAT, history=2, column=0):
    """One call on the problem; the tensors it wrote."""
    scan, (steps, batch, size) = run.scan(), run.predictions.shape
    device = run.states.device
    if op == "ddim_update":
        ddim_update(*scan, run.drift, workspace=workspace, **ON)
        return scan
    if op == "anderson_step":
        f, g, gram, filled = run.history
        rings = (f, g.to(stored), gram, filled)
        anderson_step(*scan, *rings, column, **SETTINGS, drift=run.drift, workspace=workspace, **ON)
        return (*scan, *rings)
    draw = torch.Generator().manual_seed(1)
    slope = torch.randn(steps, size, generator=draw).to(device)
    rings = ()
    if history is not None:
        z, e = (torch.randn(history + 1, steps, batch, size, generator=draw).to(device, stored) for _ in range(2))
        rings = (z, e, torch.full((steps, batch), history, dtype=torch.int32, device=device))
    if op == "inverse_scan":
        tables = (slope, slope.square(), *scan[4:6], scan[6])
        inverse_scan(*scan[:4], *tables, *rings, column, drift=run.drift, workspace=workspace, **ON)
        return (*scan, *rings)
    rest = (*rings, column) if rings else (None, None, None, 0)
    newton_scan(*scan[:4], slope, *scan[4:], *rest, drift=run.drift, workspace=workspace, **ON)
    return (*scan, *rings)


CASES = [
    ("ddim_update", 1, FLOAT, None),
    ("anderson_step", 1, FLOAT, 3),
    ("anderson_step", 2, torch.bfloat16, 3),
    ("newton_scan", 1, FLOAT, None),
    ("newton_scan", 2, FLOAT, 0),
    ("newton_scan", 1, FLOAT, 2),
    ("newton_scan", 2, torch.bfloat16, 3),
    ("newton_scan", 1, FLOAT, 3),
    ("inverse_scan", 1, FLOAT, 9),
]


@pytest.mark.parametrize(("op", "lags", "stored", "history"), CASES)
def test_triton_works_inside_its_workspace(counter, problem, op, lags, stored, history):
    steps, batch, size = 5, 2, 131
    start = problem(steps, batch, size, lags, history=history if op == "anderson_step" else 0).serve("triton")
    plain, given = start.clone(), start.clone()
    where = start.states.device
    nbytes = {
        "ddim_update": lambda: ddim_update_bytes(steps, batch, size, FLOAT, where, "triton"),
        "anderson_step": lambda: anderson_step_bytes(steps, batch, size, history, FLOAT, stored, where, "triton"),
        "newton_scan": lambda: newton_scan_bytes(
            steps, batch, size, history or 0, lags, FLOAT, stored, where, "triton"
        ),
        "inverse_scan": lambda: inverse_scan_bytes(steps, batch, size, history, FLOAT, where, "triton"),
    }[op]()
    slab = torch.full((nbytes + GUARD,), 0xFF, dtype=torch.uint8, device=where)  # NaN in every floating-point type
    expected = run_op(op, plain, None, stored, history)
    with counter() as mode:
        actual = run_op(op, given, slab[:nbytes], stored, history)
    for a, b in zip(expected, actual, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert bool((slab[nbytes:] == 0xFF).all())
    assert not bool((slab[:nbytes] == 0xFF).all()), "the workspace was not used"
    assert not [line for line in mode.found if "empty" in line]
    with pytest.raises(ValueError, match=rf"workspace: expected at least {nbytes} bytes, got {nbytes - 1}"):
        run_op(op, start.clone(), slab[: nbytes - 1], stored, history)


def test_triton_without_a_workspace_is_seen_to_allocate(counter, problem):
    run = problem(5, 2, 131).serve("triton")
    with counter() as mode:
        ddim_update(*run.scan(), run.drift, **ON)
    assert any("empty" in line for line in mode.found)


@pytest.mark.parametrize(
    "wrong", [torch.zeros(4), torch.zeros(4, 4, dtype=torch.uint8), torch.zeros(8, dtype=torch.uint8)[::2]]
)
def test_what_is_no_workspace_is_refused(problem, wrong):
    run = problem(5, 2, 17)
    with pytest.raises(ValueError, match="workspace: expected a contiguous uint8 tensor of one dimension, got "):
        ddim_update(*run.scan(), run.drift, workspace=wrong, backend="reference")


@pytest.mark.parametrize("backend", ["reference", "cpp", "auto"])
def test_other_backends_ask_for_nothing(backend):
    here = torch.device("cpu")
    assert ddim_update_bytes(5, 2, 17, FLOAT, here, backend) == 0
    assert anderson_step_bytes(5, 2, 17, 3, FLOAT, FLOAT, here, backend) == 0
    assert newton_scan_bytes(5, 2, 17, 3, 1, FLOAT, FLOAT, here, backend) == 0
    assert inverse_scan_bytes(5, 2, 17, 3, FLOAT, here, backend) == 0


NEWTON = {"quasi-newton": dq.QuasiNewton(nodes=False), "linear": dq.QuasiNewton(history=0, nodes=False)}
SOLVERS = ["picard", "triangular", "deq-ddim", "paradigms", *(pytest.param(s, id=name) for name, s in NEWTON.items())]
WIDTH = 64


@pytest.mark.parametrize("window", ["auto", 3])
@pytest.mark.parametrize("solver", SOLVERS)
def test_triton_rounds_allocate_nothing(counter, monkeypatch, ddim, solver, window):
    """The loop that runs on a GPU, from the second round on: nothing at all, or where a window slides no rows; bounds
    and the numbers of what enters, a few for each sample, are new tensors then."""
    monkeypatch.setattr(solve, "lookahead_policy", lambda system, request: Lookahead(near=0.0))
    mode, rounds, step = counter(1 if window == "auto" else WIDTH), [], DeviceLoop.step

    def watched(self, round):
        mode.found.clear()
        mode.counting = True
        step(self, round)
        mode.counting = False
        rounds.append(list(mode.found))

    monkeypatch.setattr(DeviceLoop, "step", watched)
    mode.counting = False
    start = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(0))
    options = {"solver": solver, "window": window, "backend": "triton", "tol": 1e-3, "max_rounds": 4}
    start = start if INTERPRETED else start.cuda()
    with mode:
        dq.DEQSampler(lambda x, t: 0.9 * x + 0.05 * x.sin(), ddim(5), **options).sample(start)
    assert len(rounds) >= 3
    assert not any(rounds[1:]), rounds


@pytest.mark.parametrize("solver", SOLVERS)
def test_triton_solver_steps_allocate_nothing_at_all(counter, monkeypatch, ddim, solver):
    """On a device by the counts of torch's allocator."""
    monkeypatch.setattr(solve, "lookahead_policy", lambda system, request: Lookahead(near=0.0))
    start = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(0))
    start = start if INTERPRETED else start.cuda()
    options = {"solver": solver, "backend": "triton", "tol": 1e-3, "max_rounds": 4, "cuda_graph": False}
    sampler = dq.DEQSampler(lambda x, t: 0.9 * x + 0.05 * x.sin(), ddim(5), **options)
    kind, mode, steps = type(sampler.options.solver), counter(), []
    mode.counting, step = False, kind.step

    def count():
        return len(mode.found) if INTERPRETED else torch.cuda.memory_stats(start.device)["allocation.all.allocated"]

    def watched(self, chain, memory, round):
        before, mode.counting = count(), True
        step(self, chain, memory, round)
        mode.counting = False
        steps.append(count() - before)

    monkeypatch.setattr(kind, "step", watched)
    with mode:
        sampler.sample(start)
    assert len(steps) >= 3
    assert not any(steps[1:]), (steps, mode.found)
