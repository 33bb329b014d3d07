"""Rounds, model evaluations and error of every solver, one sample at a time (B = 1), as medians over noises.

Two solves for each noise. One at the default tolerance: where the solver stops by itself, what that costs and how far
the sample then is from the serial chain's. One at tolerance 1e-5, watched round by round: the round from which on the
running sample stays within the targets, 1e-2 and 1e-4 of the serial chain's (relative L2), until it is within the
smallest. `--once` makes do with the first one, and watches that: for long chains.

`--at 1e-1 5e-2 1e-2 1e-4` asks something else: what each tolerance costs at its own stopping, with the error and the
PSNR that come of it, the evaluations that only look at the model left out.
"""

from __future__ import annotations

import argparse
import math
import warnings
from pathlib import Path
from statistics import median
from typing import Any

from torch import Tensor

import deqdiff_fast as dq
from deqdiff_fast.loop.base import Solver

from . import _tolerances
from ._chains import CHAINS
from ._common import environment, markdown, note, positive_float, positive_int, summary, write_json
from ._problems import Problem, add_model_arguments, load, relative_error, solvers, warm_up

TARGETS = [1e-2, 1e-4]
STEPS, ETA = [20, 50, 100], [0.0]
TIGHT = 1e-5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    described = "; ".join(f"{name}: {chain.what}, T = {chain.steps}" for name, chain in CHAINS.items())
    parser.add_argument(
        "--problem", choices=tuple(CHAINS), help=f"a chain of another kind, in --model's place. {described}"
    )
    parser.add_argument("--steps", type=positive_int, nargs="+", help="T (default 20 50 100, or the problem's own)")
    parser.add_argument("--eta", type=float, nargs="+", help="default 0, or the problem's own")
    parser.add_argument("--targets", type=positive_float, nargs="+", default=TARGETS, help="errors (default 1e-2 1e-4)")
    parser.add_argument(
        "--at", type=positive_float, nargs="+", metavar="TOL", help="a table of these tolerances instead"
    )
    parser.add_argument("--once", action="store_true", help="one solve for each noise, at the default tolerance")
    parser.add_argument("--noises", type=positive_int, default=3, help="noises, seeded one after the other (default 3)")
    parser.add_argument("--solvers", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="PNG of error against rounds and evaluations")


def run(args: argparse.Namespace) -> int:
    chain = CHAINS.get(args.problem)
    problem = load(args) if chain is None else chain.build(args)
    chosen = solvers(args.solvers, problem.draft is not None)
    args.steps = args.steps or (STEPS if chain is None else [chain.steps])
    args.eta = args.eta or (ETA if chain is None else [chain.eta])
    if args.plot is not None:
        from . import _plot  # refuse before the work, not after it
    facts = environment(args.device)
    warm_up(problem)
    if args.at:
        return _at_tolerances(args, problem, chosen, facts)
    rows: list[dict[str, Any]] = []
    for steps in args.steps:
        for eta in args.eta:
            rows += _cell(args, problem, chosen, steps, eta)
            write_json(args, facts, rows)
    print(f"{summary(facts)}\n{problem.name}, B = 1, medians over {args.noises} noises from seed {args.seed}\n")
    header = (
        "T", "eta", "solver", *(f"rounds to {_short(target)}" for target in args.targets),
        f"evaluations / T to {_short(args.targets[0])}", "rounds at stop", "evaluations / T", "error at stop",
        "seconds", "serial steps",
    )  # fmt: skip
    print(markdown(header, [_cells(row) for row in rows]))
    if args.plot is not None:
        _plot.error_curves(rows, args.plot, f"{problem.name}, B = 1")
        note(f"wrote {args.plot}")
    return 0


def _at_tolerances(args: argparse.Namespace, problem: Problem, chosen: dict[str, Solver], facts: dict[str, Any]) -> int:
    rows: list[dict[str, Any]] = []
    for steps in args.steps:
        for eta in args.eta:
            suited = {
                name: solver for name, solver in chosen.items() if _suits(name, solver, problem.schedule(steps, eta))
            }
            rows += _tolerances.measure(args, problem, suited, steps, eta)
            write_json(args, facts, rows)
    print(f"{summary(facts)}\n{problem.name}, B = 1, medians over {args.noises} noises from seed {args.seed}\n")
    print(_tolerances.table(rows))
    return 0


def _short(target: float) -> str:
    """1e-2 and the like."""
    return f"{target:.1e}".replace(".0e", "e").replace("e-0", "e-")


def _cell(
    args: argparse.Namespace, problem: Problem, chosen: dict[str, Solver], steps: int, eta: float
) -> list[dict[str, Any]]:
    """The rows of one T and eta: the serial chain and every solver."""
    schedule = problem.schedule(steps, eta)
    chosen = {name: solver for name, solver in chosen.items() if _suits(name, solver, schedule)}
    records: dict[str, list[dict[str, Any]]] = {name: [] for name in ("serial", *chosen)}
    for seed in range(args.seed, args.seed + args.noises):
        seeds = range(seed, seed + 1)
        noise = problem.noise(seeds) * schedule.init_noise_sigma
        chain = dq.DEQSampler(problem.model, schedule, max_batch=args.max_batch, **problem.aids)
        serial = chain.serial(noise, generator=problem.generators(seeds))
        records["serial"].append(
            {"rounds_to": [steps] * len(args.targets), "rounds": steps, "evaluations": steps, "error": 0.0,
             "seconds": serial.stats.wall_seconds, "finished_serially": 0, "curve": []}
        )  # fmt: skip
        for name, solver in chosen.items():
            note(f"T = {steps}, eta = {eta:g}, seed {seed}: {name} ...")
            records[name].append(_solve(args, problem, schedule, solver, seeds, noise, serial.sample))
    return [{"steps": steps, "eta": eta, "solver": name, "runs": runs} for name, runs in records.items()]


def _suits(name: str, solver: Solver, schedule: dq.Schedule) -> bool:
    """Whether the solver takes such a chain; says so if not."""
    try:
        if hasattr(solver, "check"):
            solver.check(schedule.num_steps, schedule.lags, "auto")
    except ValueError as error:
        note(f"T = {schedule.num_steps}: {name} is left out: {error}")
        return False
    return True


def _solve(
    args: argparse.Namespace, problem: Problem, schedule: dq.Schedule, solver: Solver, seeds: range, noise: Tensor,
    reference: Tensor,
) -> dict[str, Any]:  # fmt: skip
    """One noise, one solver: the solve at its own stopping, and the watched one."""
    spent = 0

    def counted(x: Tensor, t: Tensor) -> Any:
        nonlocal spent
        spent += len(x)
        return problem.model(x, t)

    def sampler(model: Any = problem.model, **settings: Any) -> dq.DEQSampler:
        return dq.DEQSampler(model, schedule, solver=solver, max_batch=args.max_batch, **problem.aids, **settings)

    curve: list[tuple[int, float]] = []

    def watch(info: dq.RoundInfo) -> bool:
        error = float(relative_error(info.sample(), reference)[0])
        curve.append((spent, error))
        return error <= min(args.targets) and not args.once

    draws = problem.generators
    if args.once:
        own = sampler(counted).sample(noise, generator=draws(seeds), callback=watch)
    else:
        own = sampler().sample(noise, generator=draws(seeds))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", dq.ConvergenceWarning)  # a solver out of rounds shows as a missing figure
            tight = sampler(counted, tol=TIGHT, on_failure="warn", window=schedule.num_steps)
            tight.sample(noise, generator=draws(seeds), callback=watch)
    return {
        "rounds_to": [_reached([error for _, error in curve], target) for target in args.targets],
        "rounds": own.stats.rounds,
        "evaluations": own.stats.model_evals,
        "error": float(relative_error(own.sample, reference)[0]),
        "seconds": own.stats.wall_seconds,
        "finished_serially": own.stats.finished_serially,
        "curve": curve,
    }


def _reached(errors: list[float], target: float) -> float:
    """The round from which on the error stays within the target; infinity if it never does."""
    outside = [k for k, error in enumerate(errors, 1) if not error <= target]
    first = (outside[-1] if outside else 0) + 1
    return first if first <= len(errors) else math.inf


def _spent(run: dict[str, Any]) -> float:
    """Model evaluations up to the round from which on the error stays within the first target."""
    rounds = run["rounds_to"][0]
    return float(run["curve"][int(rounds) - 1][0]) if math.isfinite(rounds) else math.inf


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    runs, steps = row["runs"], row["steps"]

    def middle(key: str) -> float:
        return float(median(run[key] for run in runs))

    reached = []
    for k in range(len(runs[0]["rounds_to"])):
        value = median(run["rounds_to"][k] for run in runs)
        reached.append(f"{value:g}" if math.isfinite(value) else f"> {median(len(run['curve']) for run in runs):g}")
    left = max(run["finished_serially"] for run in runs)
    spent = median(_spent(run) for run in runs) if row["solver"] != "serial" else steps
    return (
        str(steps), f"{row['eta']:g}", row["solver"], *reached, f"{spent / steps:.2f}", f"{middle('rounds'):g}",
        f"{middle('evaluations') / steps:.2f}", f"{middle('error'):.1e}", f"{middle('seconds'):.2f}", str(left or ""),
    )  # fmt: skip
