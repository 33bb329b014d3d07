"""How much of `sample()` is not the model: wall time of the whole call against the time inside the model, at B = 1."""

from __future__ import annotations

import argparse
import time
from statistics import median
from typing import Any

import torch

import deqdiff_fast as dq

from ._common import environment, markdown, note, positive_int, spread, summary, write_json
from ._op_calls import calls_table, measure_calls
from ._problems import Problem, add_model_arguments, load, solvers

TARGET = 0.03


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--steps", type=positive_int, nargs="+", default=[100], help="T (default 100)")
    parser.add_argument("--eta", type=float, default=0.0, help="default 0")
    parser.add_argument(
        "--repeats", type=positive_int, default=3, help="solves per solver after a first one (default 3)"
    )
    parser.add_argument("--solvers", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument("--check", action="store_true", help="exit 1 where more than 3 %% is spent outside the model")


class Stopwatch:
    """A model, or a draft of it, that adds up the time of its calls."""

    def __init__(self, model: Any, device: str) -> None:
        self.model, self.cuda, self.seconds = model, torch.device(device).type == "cuda", 0.0

    def __call__(self, x: torch.Tensor, t: torch.Tensor) -> Any:
        start = self.now()
        out = self.model(x, t)
        self.seconds += self.now() - start
        return out

    def now(self) -> float:
        """Seconds, when everything that was asked of the device is done."""
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


def run(args: argparse.Namespace) -> int:
    problem = load(args)
    chosen = solvers(args.solvers, problem.draft is not None)
    facts = environment(args.device)
    rows = []
    for steps in args.steps:
        for name, solver in chosen.items():
            note(f"T = {steps}: {name} ...")
            model = Stopwatch(problem.model, args.device)
            draft = None if problem.draft is None else Stopwatch(problem.draft, args.device)
            sampler = dq.DEQSampler(
                model,
                problem.schedule(steps, args.eta),
                solver=solver,
                max_batch=args.max_batch,
                **problem.aids | {"draft": draft},
            )
            runs = [_solve(args, problem, sampler, model, draft) for _ in range(1 + args.repeats)]
            rows.append({"steps": steps, "solver": name, "first": runs[0], "runs": runs[1:]})
    print(f"{summary(facts)}\n{problem.name}, B = 1, eta {args.eta:g}, {args.repeats} solves after a first one\n")
    header = (
        "T",
        "solver",
        "rounds",
        "model, ms / round",
        "draft, ms / round",
        "outside, ms / round",
        "outside / whole",
        "first solve",
        "verdict",
    )
    print(markdown(header, [_cells(row) for row in rows]))
    print(f"\nMedians with (smallest..largest). Target: outside / whole <= {TARGET:.0%}.")
    calls = measure_calls()
    print(f"\n{calls_table(calls)}")
    write_json(args, facts, rows + [row | {"shape": str(row["shape"])} for row in calls])
    return 1 if args.check and not all(_holds(row) for row in rows) else 0


def _solve(
    args: argparse.Namespace, problem: Problem, sampler: dq.DEQSampler, watch: Stopwatch, second: Stopwatch | None
) -> dict[str, float]:
    """One solve. seconds: the whole call; model, draft: inside of them; share: the rest, relative to the whole."""
    seeds = range(args.seed, args.seed + 1)
    noise, generators = problem.noise(seeds), problem.generators(seeds)
    watch.seconds, draft = 0.0, second or Stopwatch(None, args.device)
    draft.seconds = 0.0
    start = watch.now()
    stats = sampler.sample(noise, generator=generators).stats
    whole = watch.now() - start
    rounds = stats.rounds + stats.finished_serially
    outside = whole - watch.seconds - draft.seconds
    return {
        "seconds": whole, "model": watch.seconds, "draft": draft.seconds, "rounds": rounds, "outside": outside,
        "share": outside / whole,
    }  # fmt: skip


def _holds(row: dict[str, Any]) -> bool:
    return float(median(run["share"] for run in row["runs"])) <= TARGET


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    runs = row["runs"]
    model = [1e3 * run["model"] / run["rounds"] for run in runs]
    draft, outside = ([1e3 * run[key] / run["rounds"] for run in runs] for key in ("draft", "outside"))
    return (
        str(row["steps"]), row["solver"], str(runs[0]["rounds"]), spread(model, ".1f"), spread(draft, ".2f"),
        spread(outside, ".2f"),
        spread([100 * run["share"] for run in runs], ".2f", " %"), f"{100 * row['first']['share']:.2f} %",
        "PASS" if _holds(row) else "FAIL",
    )  # fmt: skip
