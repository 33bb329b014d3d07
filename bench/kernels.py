"""Time of each op on every side, beside a memory copy of the bytes that it has to move.

Sides: `reference` (the op's plain-torch definition, a Python loop), `eager` (the paper's formulation in torch, see
_paper.py), `eager-loop` (the same with a loop over time in place of torch's cumsum, which is slow on a CPU), `compile`
(torch.compile of `eager`), `cpp` and `triton` (this library, where available), `copy`; `bench gpu` adds `graph`, the
`triton` side replayed from a CUDA graph, always with the same column of the history. The quasi-Newton scan
and the scan over nodes are not in the paper, so they have no such side; rings hold M + 1 rounds. All run in one process
on the same number of threads and take turns; before every call, outside of the clock, the predictions are rewritten, as
the model would. `copy` is `Tensor.copy_` of half the op's bytes: what it reads and writes together is what the op reads
and writes together, each tensor counted once.
"""

from __future__ import annotations

import argparse
from statistics import median
from typing import Any

import torch

from deqdiff_fast.kernels import available_backends

from ._common import environment, markdown, note, positive_float, positive_int, spread, summary, write_json
from ._operands import HISTORY_OPS, OPS, PAPER_OPS, Copy, Fused, Inputs, Paper, Shape
from ._timing import CLOCKS, Side, interleave, ratios

SHAPES = (Shape(1, 100, 3072, 5), Shape(1, 1000, 3072, 5), Shape(16, 100, 3072, 5))
PAPER_SIDES = ("eager", "eager-loop", "compile")
SIDES = ("copy", "reference", "eager", "eager-loop", "compile", "cpp", "triton")
FASTER_THAN_EAGER, WITHIN_COPY = 4.0, 2.0
PROMISED_FASTER, PROMISED_COPY = SHAPES[:2], SHAPES[1:2]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shape", type=_shape, action="append", metavar="B,T,D,M", help="may be given again (default: three shapes)"
    )
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), help="default: those available")
    parser.add_argument("--scope", choices=("timestep", "trajectory", "triangular"), default="timestep")
    parser.add_argument("--dtype", choices=("float32", "float64", "bfloat16"), default="float32")
    parser.add_argument("--passes", type=positive_int, default=30, help="turns of all sides (default 30)")
    parser.add_argument("--budget", type=positive_float, default=4.0, help="seconds per side, op and shape (default 4)")
    parser.add_argument(
        "--clock", choices=tuple(CLOCKS), default="wall",
        help="cpu: processor time, for one thread on a machine that is not idle (default wall)",
    )  # fmt: skip
    parser.add_argument("--check", action="store_true", help="exit 1 where a promised figure is missed")


def _shape(text: str) -> Shape:
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = []
    if len(sizes) != 4 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"expected four whole numbers B,T,D,M >= 1, got {text!r}")
    return Shape(*sizes)


def run(args: argparse.Namespace) -> int:
    facts = environment(args.device)
    wanted = _available(args)
    rows: list[dict[str, Any]] = []
    for shape in args.shape or SHAPES:
        for op in args.ops:
            note(f"{op} {shape} ...")
            rows += measure(args, op, shape, wanted)
            write_json(args, facts, rows)
    print(f"{summary(facts)}, {args.dtype}, scope {args.scope}, {args.clock} clock\n")
    header = ("op", "(B, T, D, M)", "side", "MB moved", "ms", "eager / side", "eager-loop / side", "side / copy")
    print(markdown(header, [_cells(row) for row in rows]))
    print("\nMedians over the passes with (smallest..largest); ratios are formed pass by pass.")
    missed = _verdicts(rows)
    return 1 if missed and args.check else 0


def _available(args: argparse.Namespace) -> list[str]:
    on_cuda = torch.device(args.device).type == "cuda"
    status = available_backends()
    kept = []
    for side in args.sides:
        reason = ""
        if side in ("cpp", "triton"):
            reason = "" if status[side] == "available" else status[side]
            if on_cuda != (side == "triton"):
                reason = reason or f"it is not for {args.device} tensors"
        if reason:
            note(f"side {side} is left out: {reason}")
        else:
            kept.append(side)
    return kept


def measure(args: argparse.Namespace, op: str, shape: Shape, wanted: list[str]) -> list[dict[str, Any]]:
    inputs = Inputs(shape, getattr(torch, args.dtype), args.device)
    names = [name for name in wanted if op in PAPER_OPS or name not in PAPER_SIDES]
    sides = [side for name in names if (side := _side(args, name, op, inputs)) is not None]
    interleave(sides, args.device, passes=args.passes, budget=args.budget, clock=args.clock)
    by_name = {side.name: side for side in sides}
    rows = []
    for side in sides:
        row = {"op": op, "shape": [shape.batch, shape.steps, shape.size, shape.history], "side": side.name,
               "bytes_moved": inputs.moved(op), "seconds": median(side.seconds), "passes": side.seconds}  # fmt: skip
        pairs = {"eager": ("eager", side.name), "eager-loop": ("eager-loop", side.name), "copy": (side.name, "copy")}
        for label, (top, base) in pairs.items():
            if top in by_name and base in by_name and top != base:
                row[f"ratio_{label}"] = ratios(by_name[top], by_name[base])
        rows.append(row)
    return rows


def _side(args: argparse.Namespace, name: str, op: str, inputs: Inputs) -> Side | None:
    """A side that has been called already; None where it cannot run (torch.compile without a compiler)."""
    if name == "copy":
        copy = Copy(inputs.moved(op), args.device)
        return Side(name, copy.run)
    if name == "graph":
        return _graph_side(args, op, inputs)
    if name in PAPER_SIDES:
        operands: Fused | Paper = Paper(inputs, loop=name == "eager-loop", compile=name == "compile")
    else:
        operands = Fused(inputs, name, args.scope)
    if op in HISTORY_OPS:
        operands.fill(op)
    call = getattr(operands, op)
    try:
        for _ in range(inputs.shape.history + 1):  # torch.compile specialises on the columns of the history
            operands.prepare()
            call()
    except RuntimeError as error:
        if name != "compile":
            raise
        note(f"side compile is left out: {str(error).strip().splitlines()[0]}")
        return None
    return Side(name, call, operands.prepare)


def _graph_side(args: argparse.Namespace, op: str, inputs: Inputs) -> Side:
    """The Triton kernels of one round, recorded: what the op costs the device, without the host's launches."""
    operands = Fused(inputs, "triton", args.scope)
    if op in HISTORY_OPS:
        operands.fill(op)
    call = getattr(operands, op)
    call()
    graph: Any = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()

    return Side("graph", graph.replay, operands.prepare)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    shape = str(Shape(*row["shape"]))
    times = [1e3 * seconds for seconds in row["passes"]]
    compared = [spread(row[key]) if key in row else "" for key in ("ratio_eager", "ratio_eager-loop", "ratio_copy")]
    return (row["op"], shape, row["side"], f"{row['bytes_moved'] / 1e6:.1f}", spread(times, ".3g"), *compared)


def _verdicts(rows: list[dict[str, Any]]) -> int:
    """Print what the fused round promises; returns how many of the promises are missed."""
    missed = 0
    for row in rows:
        shape = Shape(*row["shape"])
        if row["op"] != "anderson_step" or row["side"] != "cpp":
            continue
        for baseline in ("eager", "eager-loop"):
            if shape in PROMISED_FASTER and f"ratio_{baseline}" in row:
                value = median(row[f"ratio_{baseline}"])
                holds = value >= FASTER_THAN_EAGER
                missed += _verdict(f"cpp round {shape}: {value:.2f} times faster than {baseline}", holds, ">= 4")
        if shape in PROMISED_COPY and "ratio_copy" in row:
            value = median(row["ratio_copy"])
            missed += _verdict(f"cpp round {shape}: {value:.2f} times the copy", value <= WITHIN_COPY, "<= 2")
    return missed


def _verdict(text: str, holds: bool, target: str) -> int:
    print(f"{'PASS' if holds else 'FAIL'}: {text} (target {target})")
    return 0 if holds else 1
