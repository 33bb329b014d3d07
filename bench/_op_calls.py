"""What a call of an op costs the host on a GPU, with Triton's launches stubbed: Python alone, without a device."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from deqdiff_fast.kernels import _backends, _launches

from ._common import markdown
from ._operands import OPS, Fused, Inputs, Shape

SHAPES = (Shape(1, 33, 3072, 3), Shape(1, 100, 3072, 3))
TARGET = 15e-6


class Stub:
    """A compiled kernel that does nothing."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args: None


@contextmanager
def launches_stubbed() -> Iterator[None]:
    """The ops' Triton side on CPU tensors, up to and without what Triton does."""
    from triton.runtime.jit import JITFunction

    run, obstacle, stub = JITFunction.run, _backends._obstacle, Stub()
    JITFunction.run = lambda self, *args, grid, warmup, **named: stub
    _backends._obstacle = lambda *_: ""
    try:
        yield
    finally:
        JITFunction.run, _backends._obstacle = run, obstacle
        _launches.reset()


def measure_calls(repeats: int = 200, passes: int = 20) -> list[dict[str, Any]]:
    """Seconds of the processor for a call that is checked and laid out, and for one like it in a later round.

    Empty without Triton, or where it interprets.
    """
    if importlib.util.find_spec("triton") is None or _backends.interpreting():
        return []
    rows = []
    with launches_stubbed():
        for shape in SHAPES:
            operands = Fused(Inputs(shape, torch.float32, "cpu"), "triton")
            for op in OPS:
                call = getattr(operands, op)
                first = min(_seconds(call, 1, _launches.reset) for _ in range(passes))
                again = min(_seconds(call, repeats) for _ in range(passes))
                rows.append({"op": op, "shape": shape, "first": first, "again": again})
    return rows


def _seconds(call: Callable[[], None], repeats: int, before: Callable[[], None] | None = None) -> float:
    """Of one call."""
    if before is not None:
        before()
    start = time.thread_time()
    for _ in range(repeats):
        call()
    return (time.thread_time() - start) / repeats


def calls_table(rows: list[dict[str, Any]]) -> str:
    """As text; empty for no rows."""
    if not rows:
        return ""
    header = ("op", "(B, T, D, M)", "first call, us", "in a later round, us", "verdict")
    cells = [
        (r["op"], str(r["shape"]), f"{1e6 * r['first']:.0f}", f"{1e6 * r['again']:.1f}",
         "PASS" if r["again"] <= TARGET else "FAIL")
        for r in rows
    ]  # fmt: skip
    return "\n".join([
        "Python of an op's call as on a GPU, launches stubbed: what Triton itself and the driver take is left out.", "",
        markdown(header, cells), "", f"Least of many. Target: <= {1e6 * TARGET:.0f} us in a later round.",
    ])  # fmt: skip
