"""What a tolerance costs and what comes of it: solves at their own stopping, medians over noises."""

from __future__ import annotations

import argparse
import math
from statistics import median
from typing import Any

from torch import Tensor

import deqdiff_fast as dq
from deqdiff_fast.loop.base import Solver

from ._common import markdown, note
from ._problems import Problem, relative_error

HEADER = (
    "T", "eta", "solver", "tol", "rounds", "evaluations / T", "error, median", "error, largest", "PSNR", "false"
)  # fmt: skip
RANGE = 2.0  # of pixels in [-1, 1]


def psnr(sample: Tensor, reference: Tensor) -> float:
    """In decibels, of the serial chain's sample."""
    off = float((sample.double() - reference.double()).square().mean())
    return 10 * math.log10(RANGE**2 / max(off, 1e-20))


def measure(
    args: argparse.Namespace, problem: Problem, chosen: dict[str, Solver], steps: int, eta: float
) -> list[dict[str, Any]]:
    """The rows of one T and eta. A model's first solve, which looks at it, is made before and left out."""
    schedule = problem.schedule(steps, eta)
    rows = [{"steps": steps, "eta": eta, "solver": name, "tol": tol, "runs": []} for name in chosen for tol in args.at]
    samplers = [
        dq.DEQSampler(
            problem.model, schedule, solver=chosen[row["solver"]], tol=row["tol"], max_batch=args.max_batch,
            **problem.aids,
        )
        for row in rows
    ]  # fmt: skip
    for seed in range(args.seed - 1, args.seed + args.noises):
        seeds = range(seed, seed + 1) if seed >= 0 else range(10**6, 10**6 + 1)
        noise = problem.noise(seeds) * schedule.init_noise_sigma
        serial = dq.DEQSampler(problem.model, schedule).serial(noise, generator=problem.generators(seeds)).sample
        note(f"T = {steps}, eta = {eta:g}, seed {seed} ...")
        for row, sampler in zip(rows, samplers, strict=True):
            found = sampler.sample(noise, generator=problem.generators(seeds))
            stats = found.stats
            run = {
                "rounds": stats.rounds,
                "evaluations": (stats.model_evals - stats.check_evals) / steps,
                "error": float(relative_error(found.sample, serial)[0]),
                "psnr": psnr(found.sample, serial),
                "converged": bool(found.converged.all()),
            }
            if seed >= args.seed:
                row["runs"].append(run)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each T, eta, solver and tolerance; false: called converged with an error above the tolerance."""
    lines = []
    for row in rows:
        runs = row["runs"]
        middle = {key: median(run[key] for run in runs) for key in ("rounds", "evaluations", "error", "psnr")}
        false = sum(run["converged"] and run["error"] > row["tol"] for run in runs)
        lines.append(
            (
                str(row["steps"]), f"{row['eta']:g}", row["solver"], f"{row['tol']:g}", f"{middle['rounds']:g}",
                f"{middle['evaluations']:.2f}", f"{middle['error']:.1e}", f"{max(run['error'] for run in runs):.1e}",
                f"{middle['psnr']:.0f} dB", f"{false} of {len(runs)}",
            )
        )  # fmt: skip
    return markdown(HEADER, lines)
