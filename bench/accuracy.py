"""The promised error: every solver's converged samples against the serial chain, from the same noise.

For each T and eta all noises are solved as one batch, and one serial reference serves every solver. Default tolerance:
relative L2 error <= 1e-2. tol = 1e-5: <= 1e-4. The largest error over the converged samples decides; a solver that runs
out of rounds finishes the chain serially, which is shown, for such a sample is exact whatever the solver did.
"""

from __future__ import annotations

import argparse
from typing import Any

import deqdiff_fast as dq
from deqdiff_fast.loop.base import Solver

from ._common import environment, markdown, note, positive_int, summary, write_json
from ._problems import Problem, add_model_arguments, load, relative_error, solvers

PROMISED = {"default": (None, 1e-2), "1e-5": (1e-5, 1e-4)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--steps", type=positive_int, nargs="+", default=[20, 50, 100], help="T (default 20 50 100)")
    parser.add_argument("--eta", type=float, nargs="+", default=[0.0, 0.5], help="default 0 0.5")
    parser.add_argument("--noises", type=positive_int, default=16, help="noises, solved as one batch (default 16)")
    parser.add_argument("--solvers", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument("--tol", nargs="+", choices=tuple(PROMISED), default=list(PROMISED), help="default: both")


def run(args: argparse.Namespace) -> int:
    problem = load(args)
    chosen = solvers(args.solvers, problem.draft is not None)
    facts = environment(args.device)
    rows: list[dict[str, Any]] = []
    for steps in args.steps:
        for eta in args.eta:
            rows += _cell(args, problem, chosen, steps, eta)
            write_json(args, facts, rows)
    print(f"{summary(facts)}\n{problem.name}, {args.noises} noises from seed {args.seed} as one batch\n")
    header = (
        "T", "eta", "solver", "tol", "largest error", "promised", "verdict", "rounds", "evaluations / (T B)",
        "not converged", "serial steps",
    )  # fmt: skip
    print(markdown(header, [_cells(row) for row in rows]))
    failed = sum(not row["holds"] for row in rows)
    print(f"\n{len(rows) - failed} of {len(rows)} cells PASS")
    return 1 if failed else 0


def _cell(
    args: argparse.Namespace, problem: Problem, chosen: dict[str, Solver], steps: int, eta: float
) -> list[dict[str, Any]]:
    """Every solver and tolerance at one T and eta."""
    schedule, seeds = problem.schedule(steps, eta), range(args.seed, args.seed + args.noises)
    noise = problem.noise(seeds)
    note(f"T = {steps}, eta = {eta:g}: serial ...")
    chain = dq.DEQSampler(problem.model, schedule, max_batch=args.max_batch, **problem.aids)
    reference = chain.serial(noise, generator=problem.generators(seeds)).sample
    rows = []
    for name, solver in chosen.items():
        for label in args.tol:
            note(f"T = {steps}, eta = {eta:g}: {name}, tol {label} ...")
            tol, promised = PROMISED[label]
            sampler = dq.DEQSampler(
                problem.model, schedule, solver=solver, tol=tol, max_batch=args.max_batch, **problem.aids
            )
            out = sampler.sample(noise, generator=problem.generators(seeds))
            errors = relative_error(out.sample, reference)
            worst = float(errors.cpu()[out.converged].max()) if bool(out.converged.any()) else float("nan")
            stats = out.stats
            rows.append(
                {"steps": steps, "eta": eta, "solver": name, "tol": label, "error": worst, "promised": promised,
                 "holds": worst <= promised, "rounds": stats.rounds, "evaluations": stats.model_evals,
                 "samples": args.noises, "unconverged": int((~out.converged).sum()),
                 "finished_serially": stats.finished_serially, "errors": errors.tolist(),
                 "seconds": stats.wall_seconds}
            )  # fmt: skip
            _say(rows[-1])
    return rows


def _say(row: dict[str, Any]) -> None:
    note(
        f"    {'PASS' if row['holds'] else 'FAIL'} {row['error']:.1e} in {row['rounds']} rounds, {row['seconds']:.0f} s"
    )


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    share = row["evaluations"] / (row["steps"] * row["samples"])
    return (
        str(row["steps"]), f"{row['eta']:g}", row["solver"], row["tol"], f"{row['error']:.1e}", f"{row['promised']:g}",
        "PASS" if row["holds"] else "FAIL", str(row["rounds"]), f"{share:.2f}", str(row["unconverged"] or ""),
        str(row["finished_serially"] or ""),
    )  # fmt: skip
