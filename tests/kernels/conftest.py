"""Random kernel arguments, poisoned wherever a kernel must not look, and their float64 twins."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import interpreter_cache
import pytest
import races
import torch
from torch import Tensor

from deqdiff_fast.kernels import _backends, _launches, available_backends

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NAN = float("nan")

if INTERPRETED and importlib.util.find_spec("triton") is not None:
    from triton.runtime import interpreter

    # For every call of a device function the interpreter puts its own functions in the place of the language's, which
    # is most of what interpreting a kernel costs. Once a launch for each module that has such functions is enough.
    _launch, _call, _patched = interpreter.GridExecutor.__call__, interpreter.InterpretedFunction.__call__, set[int]()

    def _launch_afresh(self, *args, **kwargs):
        _patched.clear()
        return _launch(self, *args, **kwargs)

    def _call_patched(self, *args, **kwargs):
        module = id(self.fn.__globals__)
        if module in _patched:
            return self.rewrite()(*args, **kwargs)
        _patched.add(module)
        return _call(self, *args, **kwargs)

    interpreter.GridExecutor.__call__ = _launch_afresh
    interpreter.InterpretedFunction.__call__ = _call_patched
    races.install(interpreter)
    interpreter_cache.install(interpreter)


def _nan(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, NAN, dtype=dtype)


@dataclass
class Problem:
    """One op's arguments. `history` is (f, g, gram, filled) or empty."""

    states: Tensor
    predictions: Tensor
    state_coef: Tensor
    model_coef: Tensor
    lo: Tensor
    hi: Tensor
    sq_diff: Tensor
    sq_norm: Tensor
    drift: Tensor | None
    history: tuple[Tensor, ...] = ()

    def scan(self) -> tuple[Tensor, ...]:
        return (
            self.states, self.predictions, self.state_coef, self.model_coef, self.lo, self.hi, self.sq_diff,
            self.sq_norm,
        )  # fmt: skip

    def map(self, function: Callable[[Tensor], Tensor]) -> Problem:
        drift = None if self.drift is None else function(self.drift)
        return Problem(*map(function, self.scan()), drift, tuple(map(function, self.history)))

    def clone(self) -> Problem:
        return self.map(torch.clone)

    def exact(self) -> Problem:
        """The same numbers in float64 on the CPU: what the reference needs to be the truth."""
        return self.map(lambda t: (t.to("cpu", torch.float64) if t.is_floating_point() else t.cpu()).clone())

    def serve(self, backend: str) -> Problem:
        """Where and how the backend wants it: accumulators and tables are float32 on a GPU."""
        if backend != "triton" or INTERPRETED:
            return self
        wide = torch.float64 if self.states.dtype == torch.float64 else torch.float32
        moved = self.map(torch.Tensor.cuda)
        narrow = {n: getattr(moved, n).to(wide) for n in ("state_coef", "model_coef", "sq_diff", "sq_norm")}
        history = (*moved.history[:2], moved.history[2].to(wide), moved.history[3]) if moved.history else ()
        return replace(moved, **narrow, history=history)


@pytest.fixture
def problem() -> Callable[..., Problem]:
    """Factory of problems. Every value that an op has no business reading is NaN."""

    def make(
        steps: int, batch: int, size: int, lags: int = 1, *, dtype: torch.dtype = torch.float32, drift: bool = True,
        history: int = 0, width: int | None = None, full: bool = False, seed: int = 0,
    ) -> Problem:  # fmt: skip
        draw = torch.Generator().manual_seed(seed)
        width = width or steps

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

        coef = torch.rand(2, steps, lags, generator=draw, dtype=torch.float64) / lags
        coef *= torch.arange(steps)[:, None] >= torch.arange(lags)
        lo = torch.tensor([0 if full else b * steps // (2 * batch) for b in range(batch)], dtype=torch.int32)
        hi = torch.tensor(
            [steps if full else steps - b * steps // (3 * batch) for b in range(batch)], dtype=torch.int32
        )
        hi = torch.minimum(hi, lo + width)
        states, predictions, noise = (
            normal(steps + 1, batch, size),
            normal(steps, batch, size),
            normal(steps, batch, size),
        )
        for b, (first, last) in enumerate(zip(lo.tolist(), hi.tolist(), strict=True)):
            before = max(first - lags + 1, 0)
            states[:before, b], states[last + 1 :, b] = NAN, NAN
            predictions[:before, b], predictions[last:, b] = NAN, NAN
            noise[:first, b], noise[last:, b] = NAN, NAN
        rings: tuple[Tensor, ...] = ()
        if history:
            ring = (history, width, batch, size)
            rings = (
                _nan(*ring, dtype=dtype),
                _nan(*ring, dtype=dtype),
                _nan(width, batch, history, history, dtype=torch.float64),
                torch.zeros(width, batch, dtype=torch.int32),
            )
        sums = _nan(2, steps, batch, dtype=torch.float64)
        return Problem(states, predictions, coef[0], coef[1], lo, hi, sums[0], sums[1], noise if drift else None, rings)

    return make


def _runnable() -> list[str]:
    """Triton where it runs: on a GPU, or interpreted, which test_interpreted.py does in a process of its own."""
    return ["reference", "cpp", *(["triton"] if available_backends()["triton"] == "available" else [])]


@pytest.fixture(params=_runnable())
def backend(request: pytest.FixtureRequest) -> str:
    status = available_backends()[request.param]
    if status != "available":
        pytest.skip(f"{request.param}: {status}")
    return request.param


@pytest.fixture
def small() -> Callable[..., tuple[int, int]]:
    """Steps and elements as asked, or fewer where every operation is interpreted; still odd and over several blocks."""

    def shrink(steps: int, size: int, most: int = 5) -> tuple[int, int]:
        return (min(steps, most), min(size, 130 + size % 7)) if INTERPRETED else (steps, size)

    return shrink


def assert_close(actual: Tensor, expected: Tensor, rtol: float, atol: float, what: str) -> None:
    """Elementwise |actual - expected| <= atol + rtol |expected|, NaN exactly where NaN is expected."""
    actual = actual.to("cpu", torch.float64)
    assert torch.equal(actual.isnan(), expected.isnan()), f"{what}: NaN in the wrong places"
    excess = ((actual - expected).abs() - rtol * expected.abs()).nan_to_num(nan=0.0)
    assert excess.max() <= atol, f"{what}: off by {excess.max():.3g} beyond rtol {rtol:.3g}, allowed {atol:.3g}"


@pytest.fixture
def close() -> Callable[..., None]:
    return assert_close


@pytest.fixture
def launched(monkeypatch):
    """Launches in order: (how, kernel's name, grid, arguments by name). No kernel is compiled."""
    jit = pytest.importorskip("triton.runtime.jit")
    if _backends.interpreting():
        pytest.skip("kernels are interpreted in this process")
    seen = []

    class Compiled:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            name, names = self.kernel.fn.__name__, self.kernel.arg_names
            return lambda *args: seen.append(("again", name, grid, dict(zip(names, args, strict=True))))

    def run(self, *args, grid, warmup, **named):
        own = {name: value for name, value in named.items() if name in self.arg_names}
        seen.append(("bound", self.fn.__name__, (*grid, 1, 1)[:3], dict(zip(self.arg_names, args)) | own))
        return Compiled(self)

    monkeypatch.setattr(jit.JITFunction, "run", run)
    monkeypatch.setattr(_backends, "_obstacle", lambda *_: "")
    _launches.reset()
    yield seen
    _launches.reset()
