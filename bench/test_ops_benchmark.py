"""pytest-benchmark entries of the ops: `pytest bench --benchmark-only`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("pytest_benchmark")

from deqdiff_fast.kernels import available_backends

from ._operands import HISTORY_OPS, OPS, PAPER_OPS, Copy, Fused, Inputs, Paper, Shape

SHAPES = [Shape(1, 100, 3072, 5), Shape(1, 1000, 3072, 5)]
SIDES = ["copy", "eager", "cpp"]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("side", SIDES)
def test_op(benchmark: Any, side: str, op: str, shape: Shape) -> None:
    if side == "cpp" and available_backends()["cpp"] != "available":
        pytest.skip(available_backends()["cpp"])
    if side == "eager" and op not in PAPER_OPS:
        pytest.skip("the paper has no such op")
    inputs = Inputs(shape, torch.float32, "cpu")
    benchmark.group = f"{op} {shape}"
    benchmark.extra_info["bytes_moved"] = inputs.moved(op)
    if side == "copy":
        copy = Copy(inputs.moved(op), "cpu")
        benchmark.pedantic(copy.run, rounds=20, warmup_rounds=2)
        assert torch.equal(copy.target, copy.source)
        return
    operands: Fused | Paper = Fused(inputs, "cpp") if side == "cpp" else Paper(inputs)
    if op in HISTORY_OPS:
        operands.fill(op)
    benchmark.pedantic(getattr(operands, op), setup=operands.prepare, rounds=20, warmup_rounds=2)
    result = operands.solver.states() if op == "anderson_step" and isinstance(operands, Paper) else operands.states
    assert result.isfinite().all()
