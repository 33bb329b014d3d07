"""One sample on several processes of one thread, against one and the author's loop; and what more would take."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, distributed

import deqdiff_fast as dq
from deqdiff_fast.planner.cost_curve import Curve
from deqdiff_fast.ranks.group import Ranks

from ._common import environment, markdown, note, positive_int, spread, summary, write_json
from ._problems import Problem, add_model_arguments, load, relative_error
from ._rank_prediction import DEVICES, LINKS, Link, predict, read_costs
from .planner import author_loop

FIGURES = ("loop", "one", "two", "path", "loop_cpu", "one_cpu", "error", "rounds")
SIZES = (1, 2, 4, 8, 16, 32, 64)  # rows of the calls that are timed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument(
        "--steps", type=positive_int, nargs="+", default=[50, 100, 1000], help="T (default 50 100 1000)"
    )
    parser.add_argument("--noises", type=positive_int, default=12, help="noises, one timing with each (default 12)")
    parser.add_argument("--devices", type=positive_int, default=2, metavar="N", help="processes (default 2)")
    parser.add_argument(
        "--delay", type=float, nargs="+", default=[], metavar="MS", help="times with so many ms before every exchange"
    )
    parser.add_argument("--costs", type=Path, metavar="FILE", help="predict from these row costs, not from those here")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    if args.device != "cpu":
        raise ValueError(f"--device: processes of one thread are measured on the CPU, got {args.device}")
    if args.worker is not None:
        return _work(args)
    known = environment(args.device)
    given = None if args.costs is None else read_costs(args.costs)
    note(summary(known))
    with tempfile.TemporaryDirectory() as folder:
        found = _launch(args, Path(folder) / "found.json")
    rows, here = found["rows"], Curve({int(n): s for n, s in found["calls"].items()})
    costs = given or here
    write_json(args, known, rows)
    n = args.devices
    header = ("T", "loop s", "1 process s", f"{n} processes s", f"1 / {n}", f"loop / {n}", f"critical path: 1 / {n}",
              f"loop / {n}", f"predicted 1 / {n}", "error", "rounds")  # fmt: skip
    print(markdown(header, [_cells(row, here, n) for row in rows]))
    if args.delay:
        print("\nWith a delay before every exchange:\n")
        header = ("T", "ms", "exchanges", "s", "s without", "more ms an exchange", "predicted s", "predicted s without")
        print(markdown(header, [line for row in rows for line in _delayed_cells(row, costs, args.devices)]))
    print("\nPrediction, not measured: the serial loop's time over that of a solve, " + ("given" if given else "these"))
    print("row costs, on so many devices:\n")
    table = [
        (row["T"], name, *(f"{_speedup(row, costs, size, name, given is None):.2f}" for size in DEVICES))
        for row in rows for name in LINKS
    ]  # fmt: skip
    print(markdown(("T", "link", *DEVICES), table))
    return 0


def _launch(args: argparse.Namespace, file: Path) -> dict[str, Any]:
    """What the processes have found, started by torch's launcher."""
    from torch.distributed import run as torchrun

    os.environ["OMP_NUM_THREADS"] = "1"
    words = ["--steps", *map(str, args.steps), "--noises", str(args.noises), "--seed", str(args.seed)]
    words += ["--model", args.model, *(["--alone"] if args.alone else []), "--threads", "1", "--worker", str(file)]
    words += ["--delay", *map(str, args.delay)] if args.delay else []
    torchrun.main(["--standalone", f"--nproc-per-node={args.devices}", "-m", "bench", "ranks", *words])
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def _work(args: argparse.Namespace) -> int:
    """One of the processes. The first one alone makes what is compared with."""
    problem = load(args)
    ranks, found = Ranks.of("world"), {"calls": {}, "rows": []}
    if ranks.rank == 0:
        found["calls"] = {n: _call_seconds(problem, n) for n in SIZES}
    for steps in args.steps:
        row = _measure(args, problem, steps, ranks)
        found["rows"].append(row)
        if ranks.rank == 0:
            note(f"T = {steps}: loop {spread(row['loop'])} s, one {spread(row['one'])} s, two {spread(row['two'])} s")
    if ranks.rank == 0:
        args.worker.write_text(json.dumps(found), encoding="utf-8")
    distributed.barrier()
    return 0


def _measure(args: argparse.Namespace, problem: Problem, steps: int, ranks: Ranks) -> dict[str, Any]:
    schedule = problem.schedule(steps, 0.0)
    solver = "draft" if problem.draft is not None else "quasi-newton"
    options: dict[str, Any] = problem.aids | {"solver": solver}
    rows: list[int] = []

    def seen(x: Tensor, t: Tensor) -> Any:
        rows.append(len(x))
        return problem.model(x, t)

    one, two = (
        dq.DEQSampler(seen, schedule, **options),
        dq.DEQSampler(problem.model, schedule, group="world", **options),
    )
    loop = author_loop(problem, schedule)
    row: dict[str, Any] = {
        "exchanges": [],
        "delayed": {ms: [] for ms in args.delay},
        "T": steps,
        "row_bytes": 4 * torch.Size(problem.shape).numel(),
    }
    row |= {
        name: [] for name in ("loop", "one", "two", "path", "loop_cpu", "one_cpu", "rest", "calls", "error", "rounds")
    }
    with torch.no_grad():
        for seed in range(-2, args.noises):  # the first two prepare
            noise = problem.noise(range(args.seed + seed + 2, args.seed + seed + 3))
            before = ranks.messages
            segments, solution, seconds = _segments(lambda noise=noise: two.sample(noise), ranks)
            row["exchanges"] += [ranks.messages - before - 1] if seed >= 0 else []  # one is of `_segments`
            for ms, taken in row["delayed"].items():
                with _delayed(ranks, ms / 1000):
                    taken += [_timed(lambda noise=noise: two.sample(noise))[1]] if seed >= 0 else []
            distributed.barrier()
            if ranks.rank == 0 and seed >= 0:
                reference, loop_seconds, loop_cpu = _timed(lambda noise=noise: loop(noise))
                rows.clear()
                alone, one_seconds, one_cpu = _timed(lambda noise=noise: one.sample(noise))
                row["calls"].append(list(rows))
                error = float(relative_error(solution.sample, reference))
                values = (loop_seconds, one_seconds, seconds, segments, loop_cpu, one_cpu, error, alone.stats.rounds)
                for name, value in zip(
                    ("loop", "one", "two", "path", "loop_cpu", "one_cpu", "error", "rounds"), values
                ):
                    row[name].append(value)
            elif ranks.rank == 0:
                one.sample(noise)
            distributed.barrier()
    return row


def _timed(work: Any) -> tuple[Any, float, float]:
    """(result, seconds, processor seconds of this thread)."""
    began, cpu = time.perf_counter(), time.thread_time()
    result = work()
    return result, time.perf_counter() - began, time.thread_time() - cpu


def _segments(work: Any, ranks: Ranks) -> tuple[float, Any, float]:
    """(seconds of the critical path by processor time, result, seconds): between two exchanges all wait for the rank
    that works longest. On a machine that others use too the wall clock says little of two processes."""
    plain, marks = ranks.gather, [time.thread_time()]

    def gather(out: Tensor, own: Tensor) -> None:
        marks.append(time.thread_time())
        plain(out, own)
        marks.append(time.thread_time())

    with _in_place_of_gather(ranks, gather):
        result, seconds, _ = _timed(work)
    marks.append(time.thread_time())
    own = [round(1e9 * (stop - start)) for start, stop in zip(marks[::2], marks[1::2])]
    return sum(map(max, zip(*ranks.exchange(own)))) / 1e9, result, seconds


@contextmanager
def _in_place_of_gather(ranks: Ranks, gather: Callable[[Tensor, Tensor], None]) -> Iterator[None]:
    """Every exchange but sums is made by it."""
    ranks.gather = gather  # type: ignore[method-assign]
    try:
        yield
    finally:
        del ranks.gather


def _delayed(ranks: Ranks, seconds: float) -> AbstractContextManager[None]:
    """A network that takes so long before the first byte arrives; this machine's own takes some 0.1 ms."""
    plain = ranks.gather

    def gather(out: Tensor, own: Tensor) -> None:
        time.sleep(seconds)
        plain(out, own)

    return _in_place_of_gather(ranks, gather)


def _call_seconds(problem: Problem, rows: int) -> float:
    """Processor seconds of a call on so many rows, the least of five."""
    x, t = problem.noise(range(rows)), torch.linspace(999, 0, rows).long()
    with torch.no_grad():
        return min(_timed(lambda: problem.model(x, t))[2] for _ in range(5))


def _speedup(row: dict[str, Any], costs: Curve, size: int, link: str, here: bool) -> float:
    """The serial loop's time over that of a solve, as predicted; here: what is done beside the model counts, too."""
    calls = row["calls"][0]
    rest = max(median(row["one_cpu"]) - sum(map(costs, calls)), 0.0) if here else 0.0
    return row["T"] * costs(1) / predict(calls, rest, costs, size, LINKS[link], row["row_bytes"])


def _delayed_cells(row: dict[str, Any], costs: Curve, devices: int) -> Iterator[tuple[str, ...]]:
    """What a delay adds to a solve, by the clock and by the model of cost, which knows of one exchange a call."""
    calls, count, plain = row["calls"][0], median(row["exchanges"]), LINKS["pcie"]
    rest = max(median(row["one_cpu"]) - sum(map(costs, calls)), 0.0)
    without = predict(calls, rest, costs, devices, plain, row["row_bytes"])
    for ms, taken in row["delayed"].items():
        slow = Link(plain.latency + float(ms) / 1000, plain.bandwidth)
        more = [1000 * (late - soon) / count for late, soon in zip(taken, row["two"])]
        found = predict(calls, rest, costs, devices, slow, row["row_bytes"])
        yield (
            str(row["T"]), f"{float(ms):g}", f"{count:g}", spread(taken), spread(row["two"]), spread(more),
            f"{found:.3f}", f"{without:.3f}",
        )  # fmt: skip


def _cells(row: dict[str, Any], costs: Curve, devices: int) -> tuple[str, ...]:
    over = lambda a, b: spread([x / y for x, y in zip(row[a], row[b])])  # noqa: E731
    rest = max(median(row["one_cpu"]) - sum(map(costs, row["calls"][0])), 0.0)
    alone, both = (predict(row["calls"][0], rest, costs, n, LINKS["pcie"], row["row_bytes"]) for n in (1, devices))
    return (
        str(row["T"]), *(f"{median(row[name]):.2f}" for name in ("loop", "one", "two")), over("one", "two"),
        over("loop", "two"), over("one_cpu", "path"), over("loop_cpu", "path"), f"{alone / both:.2f}",
        f"{max(row['error']):.1e}", f"{median(row['rounds']):g}",
    )  # fmt: skip
