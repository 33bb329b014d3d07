"""The C++ extension itself: argument checks, threads, the interpreter lock, fork, choice of instruction set."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

_C = pytest.importorskip("deqdiff_fast._C")


class Problem:
    """Arrays of one round and their addresses; keyword arguments replace what a call is given."""

    def __init__(self, steps=6, batch=2, size=10, lags=1, history=3, width=None, seed=0):
        draw = np.random.default_rng(seed)
        width = steps if width is None else width
        self.states = draw.standard_normal((steps + 1, batch, size), np.float32)
        self.predictions = draw.standard_normal((steps, batch, size), np.float32)
        self.state_coef, self.model_coef = np.full((steps, lags), 0.9), np.full((steps, lags), 0.1)
        self.lo, self.hi = np.zeros(batch, np.int32), np.full(batch, width, np.int32)
        self.sq_diff, self.sq_norm = np.zeros((steps, batch)), np.zeros((steps, batch))
        self.f, self.g = np.zeros((2, history, width, batch, size), np.float32)
        self.gram, self.filled = np.zeros((width, batch, history, history)), np.zeros((width, batch), np.int32)
        self.scan = {"T": steps, "B": batch, "D": size, "L": lags, "threads": 2, "dtype": 0, "drift": 0}
        self.mix = {"M": history, "W": width, "column": 0, "scope": 0, "ridge": 1e-3, "relative_ridge": False}
        self.mix |= {"damping": 1.0, "stale": float("inf")}

    def addresses(self, *names: str) -> dict[str, int]:
        return {name: getattr(self, name).ctypes.data for name in names}

    def _scan(self) -> dict[str, int]:
        return self.scan | self.addresses(
            "states", "predictions", "state_coef", "model_coef", "lo", "hi", "sq_diff", "sq_norm"
        )

    def ddim_update(self, **changes) -> None:
        _C.ddim_update(**(self._scan() | changes))

    def anderson_step(self, **changes) -> None:
        _C.anderson_step(**(self._scan() | self.mix | self.addresses("f", "g", "gram", "filled") | changes))


SCAN_FAULTS = {
    "dtype": 3, "states": 0, "predictions": 0, "state_coef": 0, "model_coef": 0, "lo": 0,
    "hi": 0, "sq_diff": 0, "sq_norm": 0, "T": -1, "B": -1, "D": -1, "L": 0, "threads": 0,
}  # fmt: skip
MIX_FAULTS = {
    "f": 0, "g": 0, "gram": 0, "filled": 0, "M": 9, "W": 0, "column": 3, "scope": 3, "ridge": -1.0,
    "damping": float("nan"), "stale": float("nan"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [*SCAN_FAULTS.items(), ("L", 17), ("D", 1 << 41)])
def test_ddim_update_names_the_bad_argument(name, value):
    problem = Problem()
    before = problem.states.copy()
    with pytest.raises(ValueError, match=name):
        problem.ddim_update(**{name: value})
    assert np.array_equal(problem.states, before)


@pytest.mark.parametrize(("name", "value"), [*SCAN_FAULTS.items(), *MIX_FAULTS.items()])
def test_anderson_step_names_the_bad_argument(name, value):
    with pytest.raises(ValueError, match=name):
        Problem().anderson_step(**{name: value})


def test_misaligned_addresses_are_refused():
    problem = Problem()
    with pytest.raises(ValueError, match="states: expected an address aligned to 4 bytes"):
        problem.ddim_update(states=problem.states.ctypes.data + 2)
    with pytest.raises(ValueError, match="lo"):
        problem.ddim_update(lo=problem.lo.ctypes.data + 1)


@pytest.mark.parametrize(("lo", "hi"), [(-1, 2), (0, 7), (0, 4)])
def test_windows_that_do_not_fit_are_refused(lo, hi):
    problem = Problem(width=3)
    problem.lo[1], problem.hi[1] = lo, hi
    with pytest.raises(ValueError, match=r"window \[.*\) of sample 1 must lie within \[0, 6\)"):
        problem.anderson_step()


def test_empty_problems_need_no_addresses():
    Problem(steps=0).ddim_update(states=0, predictions=0, sq_diff=0, sq_norm=0)
    Problem(batch=0).anderson_step(states=0, lo=0, hi=0, f=0, g=0)
    problem = Problem(size=0)
    problem.sq_diff[:] = -1
    problem.anderson_step(f=0, g=0)
    assert np.array_equal(problem.sq_diff, np.zeros_like(problem.sq_diff))


def test_the_interpreter_lock_is_released():
    problem = Problem(steps=2000, batch=1, size=8192, history=1, width=1)
    problem.hi[:] = 2000
    count, stop = [0], threading.Event()

    def spin() -> None:
        while not stop.is_set():
            count[0] += 1
            time.sleep(0)  # lets the kernel's thread have the lock back

    interval = sys.getswitchinterval()
    thread = threading.Thread(target=spin)
    thread.start()
    try:
        sys.setswitchinterval(100)  # from here on nobody loses the lock who does not give it away
        during = 0
        for _ in range(20):  # the operating system may leave the other thread out of one call, not of twenty
            before = count[0]
            problem.ddim_update(threads=1)
            during += count[0] - before
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        thread.join()
    assert during >= 20


def test_concurrent_calls_give_the_bits_of_a_lone_call():
    def solve(threads: int) -> tuple[np.ndarray, np.ndarray]:
        problem = Problem(steps=30, batch=2, size=4000)
        for turn in range(4):
            problem.anderson_step(column=turn % 3, threads=threads)
        return problem.states, problem.sq_diff

    expected = solve(1)
    results: list[tuple[np.ndarray, np.ndarray]] = []
    workers = [threading.Thread(target=lambda: results.append(solve(3))) for _ in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 6
    for states, sq_diff in results:
        assert np.array_equal(states, expected[0])
        assert np.array_equal(sq_diff, expected[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_computes_with_threads_of_its_own():
    problem, again = Problem(steps=30, size=4000), Problem(steps=30, size=4000)
    problem.anderson_step(threads=3)
    assert _C.build_info()["worker_threads"] >= 1
    pid = os.fork()
    if pid == 0:
        alone = _C.build_info()["worker_threads"] == 0
        again.anderson_step(threads=3)
        os._exit(0 if alone and np.array_equal(again.states, problem.states) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_the_instruction_set_can_be_lowered():
    info = _C.build_info()
    assert info["version"] == _C.__version__
    assert info["isa"] in ("baseline", "avx2", "avx512")
    # By path, without the package: importing torch takes seconds.
    code = (
        f"import importlib.util as u; s = u.spec_from_file_location('_C', {_C.__file__!r}); "
        "m = u.module_from_spec(s); s.loader.exec_module(m); print(m.build_info()['isa'])"
    )
    lowered = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "DEQDIFF_FAST_ISA": "baseline"},
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert lowered.stdout.strip() == "baseline"
