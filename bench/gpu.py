"""Everything a CUDA device is asked: tests, each op against its byte floor, whole samples at B = 1, and launch shapes.

Ops: `copy` moves the bytes that the op has to, with the device's own copy; `eager` is the paper's formulation in torch
(_paper.py), `compile` its torch.compile, `triton` (`cpp` on a CPU) this library, `graph` the same replayed from a CUDA
graph. Samples: the serial chain written by hand, in eager, compiled and CUDA-graphed form, against `sample()` over all
timesteps at once, plain and with its rounds recorded, and against `sample()` as the planner would have it. Networks
other than the bundled one have random weights: they show the time of a round, not how many rounds a trained network
takes. Host syncs are those that torch reports between the first and the last model call of a solve. Runs on a CPU too,
which shows that it works and nothing else. Needs no diffusers. Each table is printed, and all figures are written, as
soon as they are there: on CUDA to bench/results/<device>.md and .json, costs of rows for `bench ranks --costs` beside.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any

import torch

from . import ROOT
from ._common import _plain, environment, markdown, note, positive_float, positive_int, spread, summary, write_json
from ._gpu_costs import ROWS, measure_costs
from ._gpu_models import NAMES
from ._gpu_samples import measure_samples
from ._operands import OPS, PAPER_OPS, Shape
from .kernels import _shape, measure

LARGE = Shape(8, 1000, 3072, 5)  # D T B >= 2^24
SMALL = Shape(1, 100, 3072, 5)
Left = Callable[[], float]  # seconds
FLOOR, FASTER_EAGER, FASTER_COMPILED, STEP_SECONDS = 1.25, 10.0, 3.0, 60e-6
PARTS = {"tests": 3, "ops": 3, "samples": 4, "costs": 1, "tuning": 1}
"""Each part's minutes of the twelve, in the order of worth; what one leaves over is the next one's."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    select = "pytest -k of the tests (default: on CUDA those that use the device, else all of the kernels')"
    parser.add_argument("--select", metavar="EXPR", help=select)
    parser.add_argument("--shape", type=_shape, action="append", metavar="B,T,D,M", help="of the ops; may be repeated")
    parser.add_argument("--models", nargs="+", choices=NAMES, default=["cifar10", "bundled"])
    parser.add_argument("--steps", type=positive_int, nargs="+", default=[100, 50, 1000], help="T of the samples")
    parser.add_argument("--passes", type=positive_int, default=20, help="turns of all sides of an op (default 20)")
    parser.add_argument("--repeats", type=positive_int, default=3, help="timed runs of a sample (default 3)")
    seconds = "for all (default 720), in the proportions of the parts; what there is no time for is left out"
    parser.add_argument("--seconds", type=positive_float, default=60.0 * sum(PARTS.values()), help=seconds)
    parser.add_argument(
        "--compiler", default="inductor", metavar="BACKEND", help="of torch.compile; 'none': without it"
    )
    parser.add_argument(
        "--compile-sample", action="store_true", help="also sample() with the compiled model: compiles some seven sizes"
    )
    parser.add_argument(
        "--rows", type=positive_int, nargs="+", default=ROWS, help="of the calls whose cost is measured"
    )
    out = "what is written after every part; default on CUDA: bench/results"
    parser.add_argument("--out", "--results", dest="results", type=Path, metavar="FOLDER", help=out)
    parser.add_argument("--tune", type=Path, metavar="FILE", help="instead: time launch shapes, write the best ones")


def run(args: argparse.Namespace) -> int:
    if args.tune is not None:
        from ._tune import tune

        started = time.monotonic()
        print(tune(args, lambda: args.seconds - (time.monotonic() - started), args.tune))
        return 0
    began = time.monotonic()
    facts, rows, cuda = environment(args.device), [], torch.device(args.device).type == "cuda"
    parts: dict[str, Callable[[Left], list[dict[str, Any]]]] = {
        "tests": lambda left: [_device_tests(args, max(1.0, left()), cuda)],
        "ops": lambda left: _ops(args, left, cuda),
        "samples": lambda left: measure_samples(args, left),
        "costs": lambda left: measure_costs(args, left),
        "tuning": lambda left: _tuning(args, left, cuda),
    }
    for part, end in deadlines(args.parts, args.seconds).items():
        new = parts[part](lambda end=end: end - (time.monotonic() - began))  # type: ignore[misc]
        rows += new
        print(_tables(new), flush=True)
        _save(args, facts, rows, cuda)
    print("\n\n".join(_judged(rows, cuda)))
    return 0 if all(row.get("passed", True) for row in rows) else 1


def deadlines(parts: Sequence[str], seconds: float) -> dict[str, float]:
    """When each of the parts has to be over, in seconds from the start of all."""
    chosen = [part for part in PARTS if part in parts]
    ends = accumulate(PARTS[part] for part in chosen)
    return {part: seconds * end / sum(PARTS[p] for p in chosen) for part, end in zip(chosen, ends)}


def _tuning(args: argparse.Namespace, left: Left, cuda: bool) -> list[dict[str, Any]]:
    """Better launch shapes, as far as there is time to look for them, into a file beside the results."""
    if not cuda or left() < 40:
        note("tuning: left out, " + ("the time is up" if cuda else "there is no CUDA device"))
        return []
    from ._tune import tune

    folder = args.results or ROOT / "bench" / "results"
    folder.mkdir(parents=True, exist_ok=True)
    return [{"part": "tuning", "table": tune(args, left, folder / "launch_shapes.json")}]


def _save(args: argparse.Namespace, facts: dict[str, Any], rows: list[dict[str, Any]], cuda: bool) -> None:
    """What there is so far: a machine that is lent may be gone before the end."""
    write_json(args, facts, rows)
    folder = args.results or (ROOT / "bench" / "results" if cuda else None)
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "_", str(facts["device"]).lower()).strip("_")
    head = f"`python -m bench gpu`, {summary(facts)}, triton {facts['triton']}"
    text = "\n\n".join([head, _tables(rows), *_judged(rows, cuda)])
    (folder / f"{name}.md").write_text(text + "\n", encoding="utf-8")
    report = {"benchmark": "gpu", "environment": facts, "rows": rows}
    (folder / f"{name}.json").write_text(json.dumps(_plain(report), indent=1) + "\n", encoding="utf-8")
    for row in rows:
        if row.get("part") == "costs":  # as `bench ranks --costs` reads it
            calls = {str(count): seconds for count, seconds in row["calls"].items()}
            (folder / f"{name}_{row['model']}_costs.json").write_text(json.dumps({"calls": calls}) + "\n")


def _device_tests(args: argparse.Namespace, seconds: float, cuda: bool) -> dict[str, Any]:
    """Of the kernels, and on a device of what is recorded and of the loop there."""
    note("tests ...")
    files = ["tests/kernels", *(["tests/engine/test_cuda_graphs.py", "tests/loop/test_device.py"] if cuda else [])]
    chosen = args.select or ("triton or on_cuda or device" if cuda else "")
    # not `-m pytest`: it puts this checkout before the installed package on the path
    start = "import sys; sys.path.remove(''); import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    command = [sys.executable, "-c", start, "-q", "--import-mode=importlib", "-p", "no:cacheprovider"]
    command += [*files, *(["-k", chosen] if chosen else []), *(["--ignore=tests/kernels/test_interpreted.py"] * cuda)]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
        said, passed = done.stdout.strip().splitlines()[-1:], done.returncode == 0
    except subprocess.TimeoutExpired:
        said, passed = [f"not finished in {seconds:.0f} s"], False
    return {"part": "tests", "said": said[0] if said else "nothing", "passed": passed}


def _ops(args: argparse.Namespace, left: Left, cuda: bool) -> list[dict[str, Any]]:
    """Rows of bench.kernels, the loop over time and the Python reference left out."""
    fused = "triton" if cuda else "cpp"
    sides = [
        "copy",
        "eager",
        *(["compile"] if args.compiler == "inductor" else []),
        fused,
        *(["graph"] if cuda else []),
    ]
    rows: list[dict[str, Any]] = []
    settings = argparse.Namespace(
        dtype="float32", device=args.device, scope="timestep", passes=args.passes, budget=2.0, clock="wall"
    )
    for shape in args.shape or (SMALL, LARGE):
        for op in OPS:
            if left() < 20:
                note(f"{op} {shape}: left out, the time is up")
                continue
            note(f"{op} {shape} ...")
            wanted = [name for name in sides if op in PAPER_OPS or name not in ("eager", "compile")]
            found = measure(settings, op, shape, wanted)
            copy = next(row["seconds"] for row in found if row["side"] == "copy")
            for row in found:
                row |= {"part": "ops", "floor": row["seconds"] / copy, "copy_rate": row["bytes_moved"] / copy}
            rows += found
    return rows


def _tables(rows: list[dict[str, Any]]) -> str:
    """The tables of these rows."""
    text = [f"Tests: {row['said']}." for row in rows if row.get("part") == "tests"]
    ops = [row for row in rows if row.get("part") == "ops"]
    if ops:
        header = ("op", "(B, T, D, M)", "side", "MB moved", "ms", "side / copy")
        cells = [
            (r["op"], str(Shape(*r["shape"])), r["side"], f"{r['bytes_moved'] / 1e6:.1f}",
             spread([1e3 * s for s in r["passes"]], ".4g"), f"{r['floor']:.2f}")
            for r in ops
        ]  # fmt: skip
        rate = max(row["copy_rate"] for row in ops) / 1e9
        text += [markdown(header, cells), f"The device's own copy moves {rate:.0f} GB/s, reading and writing."]
    samples = [row for row in rows if row.get("part") == "samples"]
    if samples:
        header = ("network", "T", "way", "ms", "rounds", "ms / round", "model evaluations", "host syncs", "error")
        cells = [
            (r["model"], str(r["steps"]), r["way"], spread([1e3 * s for s in r["runs"]], ".4g"), str(r["rounds"]),
             f"{1e3 * median(r['runs']) / r['rounds']:.3g}", str(r["evaluations"]),
             "" if r["syncs"] is None else str(r["syncs"]), f"{r['error']:.1e}")
            for r in samples
        ]  # fmt: skip
        text += [markdown(header, cells), "B = 1. Only the bundled network is trained; the others have random weights."]
    costs = [row for row in rows if row.get("part") == "costs"]
    if costs:
        cells = [
            (
                row["model"],
                str(count),
                f"{1e3 * seconds:.3g}",
                f"{seconds / count / row['calls'][min(row['calls'])]:.2f}",
            )
            for row in costs
            for count, seconds in row["calls"].items()
        ]
        text.append(markdown(("network", "rows of a call", "ms", "a row, against a call on one"), cells))
    text += [row["table"] for row in rows if row.get("part") == "tuning"]
    return "\n\n".join(text)


def _judged(rows: list[dict[str, Any]], cuda: bool) -> list[str]:
    if not cuda:
        return ["No CUDA device: the goals are not judged."]
    return _goals(*([row for row in rows if row.get("part") == part] for part in ("ops", "samples")))


def _goals(ops: list[dict[str, Any]], samples: list[dict[str, Any]]) -> list[str]:
    """The goals as PASS or FAIL, as far as they were measured."""
    found: list[str] = []

    def judge(holds: bool, words: str) -> None:
        found.append(f"{'PASS' if holds else 'FAIL'}: {words}")

    by = {(r["op"], tuple(r["shape"]), r["side"]): r["seconds"] for r in ops}
    for (op, shape, side), seconds in by.items():
        large = shape[0] * shape[1] * shape[2] >= 1 << 24
        if side == "graph" and large:
            ratio = seconds / by[op, shape, "copy"]
            judge(ratio <= FLOOR, f"{op} {Shape(*shape)} takes {ratio:.2f} times its byte floor (goal {FLOOR})")
    small = (SMALL.batch, SMALL.steps, SMALL.size, SMALL.history)
    step = by.get(("anderson_step", small, "graph"))
    if step is not None:
        judge(step <= STEP_SECONDS, f"anderson_step {SMALL} in a graph: {1e6 * step:.1f} us (goal 60)")
        for side, goal in (("eager", FASTER_EAGER), ("compile", FASTER_COMPILED)):
            if ("anderson_step", small, side) in by:
                ratio = by["anderson_step", small, side] / step
                judge(ratio >= goal, f"anderson_step {SMALL}: {ratio:.1f} times faster than {side} (goal {goal:g})")
    times = {(r["model"], r["steps"], r["way"]): median(r["runs"]) for r in samples}
    for way, goal in (("serial, eager", FASTER_EAGER), ("serial, graph", FASTER_COMPILED)):
        mine, base = times.get(("cifar10", 100, "sample, graph")), times.get(("cifar10", 100, way))
        if mine and base:
            words = f"sample(), T = 100, cifar10: {base / mine:.2f} times faster than {way} (goal {goal:g})"
            judge(base / mine >= goal, words)
    return found
