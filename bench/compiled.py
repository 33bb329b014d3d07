"""What the compiled kernels predict for GPUs that are not here: registers, occupancy, bytes, launches; no times taken.

Kernels are compiled ahead of time with the launch shapes of kernels/_config.py (see _ahead.py). Bytes are counted from
the kernels' formulas, each tensor once for every pass over it, partial sums and tables left out: they are below one in
a hundred. A floor time is these bytes at the published peak rate of the memory; no device reaches it, and what is kept
in a cache between two kernels can beat it. Launches are counted in the loop that a GPU runs, played here on the CPU:
Triton's by op, and every torch operation that computes something as one.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import deqdiff_fast as dq
from deqdiff_fast.engine import solve
from deqdiff_fast.loop import device as loop
from deqdiff_fast.loop.task import Lookahead

from ._common import environment, markdown, note, summary, write_json
from ._operands import OPS, Inputs, Paper, Shape, elements_moved

PEAK = 3.35e12  # bytes per second, H100 SXM5, HBM3: NVIDIA's data sheet
MULTIPROCESSORS = 132
SHAPES = (Shape(1, 100, 3072, 5), Shape(8, 1000, 3072, 5))
FLOOR = 1.25  # the goal: times the bytes that an op has to move
SOLVERS = ("picard", "triangular", "deq-ddim", "paradigms", "quasi-newton")
LAUNCHES = {
    "ddim_update": 2,
    "anderson_step": 3,
    "newton_scan": 3,
    "node_scan": 1,
    "mark_converged": 1,
    "advance_window": 2,
    "copy_rows": 1,
}
"""Triton launches of an op, as tests/kernels/test_launches.py counts them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--architectures", nargs="+", choices=("sm_80", "sm_90", "sm_100"), default=["sm_90"])
    parser.add_argument("--select", default="-fp32", metavar="REGEX", help="kernels, by name (default: those of fp32)")
    parser.add_argument("--results", type=Path, metavar="FILE", help="also write the report there")


def run(args: argparse.Namespace) -> int:
    facts, rows = environment(args.device), compiled_rows(args.architectures, args.select)
    if not rows:
        raise ValueError(f"--select: expected a pattern of kernel names, {args.select!r} matches none")
    moved, rounds = byte_rows(), [launch_row(name) for name in SOLVERS]
    text = "\n\n".join(report(facts, rows, moved, rounds, paper_operations()))
    print(text)
    write_json(args, facts, rows + moved + rounds)
    if args.results is not None:
        args.results.write_text(text + "\n", encoding="utf-8")
    return 0


def compiled_rows(architectures: list[str], select: str) -> list[dict[str, Any]]:
    """Registers, shared memory, spills, resident warps and 16-byte accesses of each kernel, as its binary has them."""
    from . import _ahead  # not before it is needed: it needs Triton

    rows = []
    for architecture in architectures:
        for name in filter(re.compile(select).search, _ahead.CASES):
            note(f"{architecture} {name} ...")
            kernel = _ahead.compiled(name, _ahead.NVIDIA[architecture])
            with tempfile.TemporaryDirectory() as folder:
                used = _ahead.resources(kernel.asm["cubin"], Path(folder))
            shared, warps = max(used["SHARED"], kernel.metadata.shared), kernel.metadata.num_warps
            wide = [len(re.findall(rf"\b{op}\.global\S*\.v4\.b32", kernel.asm["ptx"])) for op in ("ld", "st")]
            rows.append(
                {"part": "kernel", "architecture": architecture, "kernel": name, "registers": used["REG"],
                 "shared": shared, "spilled": used["LOCAL"] + used["STACK"], "warps": warps,
                 "resident": _ahead.resident_warps(used["REG"], shared, warps, architecture),
                 "loads": wide[0], "stores": wide[1]}
            )  # fmt: skip
    return rows


def elements_of_kernels(op: str, shape: Shape) -> list[tuple[str, float]]:
    """Elements that each kernel of an op reads or writes for one state element, one lag, no drift, undamped."""
    m = shape.history
    return {
        "ddim_update": [("ddim_update_kernel: E, X in; F out", 3)],
        "anderson_step": [
            (f"anderson_scan_kernel: E, X, {m - 1} of g in; a column of f and of g out", m + 3),
            (f"anderson_mix_kernel: {m} of f in; X out", m + 1),
        ],
        "newton_scan": [
            (f"newton_prepare_kernel: E, X, {m} of z in; a column of z and of e out", m + 4),
            (f"newton_advance_kernel: E, X, N, this round's z, {m} of z and of e in; N out", 2 * m + 5),
        ],
        "inverse_scan": [
            (f"inverse_prepare_kernel: E, X, the next X, {m} of z and of e in; a column of z and of e out", 2 * m + 5),
            (f"inverse_advance_kernel, dots: E, X, the next N, {m} of z and of e in", 2 * m + 3),
            ("inverse_advance_kernel, steps: the same again, partly from the cache; N out", 2 * m + 4),
        ],
        "secant_fit": [("secant_fit_kernel: the Gram in, the fit out, in float64", elements_moved(op, shape))],
        "node_scan": [("node_scan_kernel: E in, most of a stencil from the cache; X out", 2)],
    }[op]


def byte_rows() -> list[dict[str, Any]]:
    """Bytes and floor times of every op at the goals' sizes, float32."""
    rows = []
    for shape in SHAPES:
        for op in OPS:
            parts = elements_of_kernels(op, shape)
            ours, least = sum(count for _, count in parts), elements_moved(op, shape)
            moved = round(4 * ours * shape.elements)
            rows.append({"part": "bytes", "op": op, "shape": str(shape), "kernels": parts, "elements": ours,
                         "least": least, "bytes": moved, "floor_seconds": moved / PEAK})  # fmt: skip
    return rows


class Operations(TorchDispatchMode):
    """Counts operations that compute something: views, and empty memory, launch nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.counting, self.found = False, Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if self.counting and not func.is_view and "empty" not in name and "_unsafe_view" not in name:
            self.found[name.removeprefix("aten.").removeprefix("deqdiff_fast.").partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def launch_row(solver: str) -> dict[str, Any]:
    """Launches of one round beside the model, all timesteps at once: the solver's step, the decision, the window."""
    mode, rounds = Operations(), []
    before, step = solve.lookahead_policy, loop.DeviceLoop.step

    def watched(self: Any, round: int, *doubted: Any) -> None:
        mode.found.clear()
        mode.counting = True
        step(self, round, *doubted)
        mode.counting = False
        rounds.append(dict(mode.found))

    alphas = torch.linspace(0.9999, 0.98, 1000, dtype=torch.float64).cumprod(0)
    sampler = dq.DEQSampler(
        lambda x, t: 0.9 * x, dq.Schedule.ddim(alphas, torch.arange(12).flip(0) * 80), solver=solver, window=12,
        certify="full",  # else it may be found without a round on all timesteps
    )  # fmt: skip
    solve.lookahead_policy, loop.DeviceLoop.step = lambda system, request: Lookahead(near=0.0), watched
    try:
        with mode:
            sampler.sample(torch.randn(1, 16, generator=torch.Generator().manual_seed(0)))
    finally:
        solve.lookahead_policy, loop.DeviceLoop.step = before, step
    last = rounds[-1]
    ours = {op: count * LAUNCHES[op] for op, count in last.items() if op in LAUNCHES}
    return {"part": "launches", "solver": solver, "triton": ours,
            "torch": {name: count for name, count in last.items() if name not in LAUNCHES}}  # fmt: skip


def paper_operations() -> int:
    """Operations of one round of the paper's formulation in eager torch; a batched solve counts as one."""
    paper, mode = Paper(Inputs(Shape(1, 12, 16, 5), torch.float32, "cpu")).fill(), Operations()
    paper.prepare()
    with mode:
        mode.counting = True
        paper.anderson_step()
    return sum(mode.found.values())


def report(
    facts: dict[str, Any], rows: list[dict[str, Any]], moved: list[dict[str, Any]], rounds: list[dict[str, Any]],
    paper: int,
) -> list[str]:  # fmt: skip
    kernels = markdown(
        ("target", "kernel", "registers", "shared bytes", "spilled", "warps", "resident of 64", "16-byte ld / st"),
        [(r["architecture"], r["kernel"], r["registers"], r["shared"], r["spilled"], r["warps"], r["resident"],
          f"{r['loads']} / {r['stores']}") for r in rows],
    )  # fmt: skip
    floors = markdown(
        ("op", "(B, T, D, M)", "elements moved", "least", "ours / least", "MB", "predicted floor"),
        [(r["op"], r["shape"], f"{r['elements']:.3g}", f"{r['least']:.3g}", f"{r['elements'] / r['least']:.2f}",
          f"{r['bytes'] / 1e6:.1f}", f"{1e6 * r['floor_seconds']:.1f} us") for r in moved],
    )  # fmt: skip
    passes = "\n".join(f"- `{op}`: {what}: {count:.3g}" for op, parts in _parts(moved) for what, count in parts)
    counts = markdown(
        ("solver", "Triton launches", "torch operations", "of which"),
        [(r["solver"], " + ".join(f"{n} {op}" for op, n in r["triton"].items()), sum(r["torch"].values()),
          ", ".join(f"{n} {name}" for name, n in sorted(r["torch"].items()))) for r in rounds],
    )  # fmt: skip
    return [
        f"`python -m bench compiled`, {summary(facts)}, triton {facts['triton']}. "
        "**Predicted from compiled code and counted bytes; nothing here was measured on a GPU.**",
        kernels,
        f"Bytes of one round, float32; floor at {PEAK / 1e12:.2f} TB/s (H100 SXM5, HBM3, published peak):",
        floors,
        f"Elements that pass between memory and each kernel, per state element, M = {SHAPES[0].history}:",
        passes,
        "Launches of one round beside the model, all timesteps at once:",
        counts,
        f"The paper's round in eager torch: {paper} operations.",
        "\n".join(goals(moved)),
    ]


def _parts(moved: list[dict[str, Any]]) -> list[tuple[str, Any]]:
    return list({r["op"]: r["kernels"] for r in reversed(moved)}.items())[::-1]


def goals(moved: list[dict[str, Any]]) -> list[str]:
    """What the counted bytes alone say of the goal; a device can only add to them."""
    found = []
    for row in moved:
        if row["shape"] == str(SHAPES[1]):
            ratio = row["elements"] / row["least"]
            word = "possible" if ratio <= FLOOR else "out of reach"
            found.append(
                f"- {word} by bytes: {row['op']} within {FLOOR} times its byte floor (moves {ratio:.2f} times)"
            )
    return found
