"""Every launch that is interpreted is checked for races, in conftest.py; here, that the check finds what races."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import kernel_operands
import pytest
import torch
from races import CHECKED

import deqdiff_fast.kernels as kernels

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("nothing is interpreted in this process", allow_module_level=True)
triton = pytest.importorskip("triton")
tl = triton.language
from triton.runtime.interpreter import interpreter_builder  # noqa: E402


@triton.jit
def shifted(x, N, BLOCK: tl.constexpr):
    """A program reads what its neighbour writes."""
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + lanes, tl.load(x + lanes + 1, mask=lanes + 1 < N, other=0.0), mask=lanes < N)


@triton.jit
def same_place(x, N, BLOCK: tl.constexpr):
    """Every program writes its sum to the same place."""
    tl.store(x, tl.sum(tl.load(x + 1 + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))))


@triton.jit
def past_the_end(x, y, N, BLOCK: tl.constexpr):
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + lanes, tl.load(x + lanes + 1, mask=lanes < N, other=0.0), mask=lanes < N)


@triton.jit
def reversed_rows(x, y, N, BARRIER: tl.constexpr, BLOCK: tl.constexpr):
    """A thread reads what another one of its program has written, or maybe it itself has."""
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + lanes, tl.load(x + lanes), mask=lanes < N)
    if BARRIER:
        tl.debug_barrier()
    other = tl.program_id(0) * BLOCK + BLOCK - 1 - tl.arange(0, BLOCK)
    tl.store(x + lanes, tl.load(y + other))


@triton.jit
def turned(x, N, BLOCK: tl.constexpr):
    """A thread writes what another one of its program has yet to read."""
    lanes = tl.arange(0, BLOCK)
    x += tl.program_id(0) * BLOCK
    tl.store(x + lanes, tl.load(x + BLOCK - 1 - lanes))


@triton.jit
def written_twice(x, N, BLOCK: tl.constexpr):
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + lanes, 1.0, mask=lanes < N)
    tl.store(x + lanes, 2.0, mask=lanes < N)


@triton.jit
def in_its_place(x, N, BLOCK: tl.constexpr):
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + lanes, 2 * tl.load(x + lanes, mask=lanes < N), mask=lanes < N)


@pytest.mark.parametrize(
    ("kernel", "tensors", "constants", "said"),
    [
        (shifted, 1, {}, "shifted: 3 places are accessed by several programs and written by one"),
        (same_place, 1, {}, "same_place: 1 places are accessed by several programs and written by one"),
        (past_the_end, 2, {}, r"past_the_end: program \d reads 1 elements outside of its tensors"),
        (reversed_rows, 2, {"BARRIER": False}, "16 places are read after they were written without a barrier"),
        (turned, 1, {}, "turned: 16 places are accessed by several threads and written by one without a barrier"),
        (written_twice, 1, {}, "written_twice: 16 places are written twice by a program without a barrier"),
    ],
)  # fmt: skip
def test_triton_a_planted_fault_is_found(kernel, tensors, constants, said):
    with pytest.raises(AssertionError, match=said):
        kernel[(4,)](
            *(torch.ones(17 if kernel is same_place else 16) for _ in range(tensors)), 16, BLOCK=4, **constants
        )


def test_triton_what_is_right_passes():
    x = torch.arange(16.0)
    in_its_place[(4,)](x, 16, BLOCK=4)
    assert x.tolist() == [2.0 * k for k in range(16)]
    reversed_rows[(4,)](x, torch.zeros(16), 16, BARRIER=True, BLOCK=4)
    assert x[:4].tolist() == [6, 4, 2, 0]


def test_triton_programs_run_in_another_order():
    seen = set()
    for _ in range(8):
        x = torch.zeros(4, dtype=torch.int32)
        with pytest.raises(AssertionError):
            counted[(4,)](x[:1], x)
        seen.add(tuple(x.tolist()))
    assert len(seen) > 1


@triton.jit
def counted(count, x):
    """The number of each program in the order in which they ran."""
    now = tl.load(count)
    tl.store(x + tl.program_id(0), now)
    tl.store(count, now + 1)


@pytest.mark.parametrize("op", ["newton_scan", "inverse_scan"])
def test_triton_scans_over_time_need_their_barriers(monkeypatch, op):
    monkeypatch.setattr(type(interpreter_builder), "create_barrier", lambda self: None)
    with pytest.raises(AssertionError, match="without a barrier"):
        called(op)


def called(op: str, **changed) -> None:
    getattr(kernels, op)(**kernel_operands.operands(op) | changed, backend="triton")


def kernel_names() -> set[str]:
    """All kernels of the package."""
    folder, found = Path(kernels.__file__).parent, set()
    for path in folder.rglob("_triton*.py"):
        defined = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
        found |= {node.name for node in defined if node.name.endswith("_kernel")}
    return found


def test_triton_every_kernel_is_checked():
    """Whatever other tests of this process have launched."""
    CHECKED.clear()
    for op in kernel_operands.OPS:
        called(op)
    called("newton_scan", z=None, e=None, filled=None)
    assert kernel_names() == CHECKED
