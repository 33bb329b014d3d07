"""What a guess of the sample saves: rounds with `sample(init=...)` and without, B = 1.

The guesses stand in for one-step students: the sample itself with a part of noise (relative L2), or that much of
another sample, which has the spectrum of samples; and the model's own chain of two steps. For each: rounds until the
solve ends, rounds until its running sample is within 1e-2 of the serial chain's, evaluations, and the errors of the
guess and after the first three rounds, as medians over noises; `max` is the largest error at the end.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import deqdiff_fast as dq
from deqdiff_fast.distillation import GET

from ._common import environment, markdown, note, positive_int, summary, write_json
from ._problems import Problem, add_model_arguments, load, relative_error

STEPS, SHARES, TARGET, SHOWN = [50, 100], [0.1, 0.3], 1e-2, 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--steps", type=positive_int, nargs="+", default=STEPS, help="T (default 50 100)")
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="errors of guesses (default 0.1 0.3)")
    parser.add_argument("--student", type=Path, help="a GET's file: its samples as further guesses")
    parser.add_argument("--noises", type=positive_int, default=3, help="noises, seeded one after the other (default 3)")


def run(args: argparse.Namespace) -> int:
    problem, facts = load(args), environment(args.device)
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        for steps in args.steps:
            for solver in ("quasi-newton", *(["draft"] if problem.draft is not None else [])):
                rows += _cell(args, problem, steps, solver)
                write_json(args, facts, rows)
    print(f"{summary(facts)}\n{problem.name}, B = 1, medians over {args.noises} noises from seed {args.seed}\n")
    header = ("T", "solver", "guess", "error", *(f"round {k + 1}" for k in range(SHOWN)), f"rounds to {TARGET:g}",
              "rounds at stop", "evaluations / T", "max")  # fmt: skip
    print(markdown(header, [_cells(row) for row in rows]))
    return 0


def _guesses(
    args: argparse.Namespace, problem: Problem, exact: Tensor, other: Tensor
) -> dict[str, Tensor | Callable[[Tensor], Tensor] | None]:
    """By name."""
    draw = torch.Generator().manual_seed(10**6 + args.seed)
    directions = {"noise": torch.randn(exact.shape, generator=draw).to(exact), "another sample": other - exact}
    found: dict[str, Any] = {"none": None}
    for share in args.shares:
        for name, way in directions.items():
            found[f"{share:.0%} {name}"] = exact + share * exact.norm() / way.norm() * way
    two = dq.DEQSampler(problem.model, problem.schedule(2, 0.0))
    found["2 steps"] = lambda noise: two.serial(noise).sample
    if args.student is not None:
        found["student"] = GET.load(args.student, device=args.device)
    return found


def _cell(args: argparse.Namespace, problem: Problem, steps: int, solver: str) -> list[dict[str, Any]]:
    """The rows of one T and solver."""
    schedule, runs = problem.schedule(steps, 0.0), dict[str, list[dict[str, Any]]]()
    aids = {"spectrum": problem.spectrum, "draft": problem.draft if solver == "draft" else None}
    sampler = dq.DEQSampler(problem.model, schedule, solver=solver, max_batch=args.max_batch, **aids)
    scale = schedule.init_noise_sigma
    sampler.sample(problem.noise(range(args.seed, args.seed + 1)) * scale)  # the first looks at more timesteps
    for seed in range(args.seed, args.seed + args.noises):
        note(f"T = {steps}, {solver}, seed {seed} ...")
        noise = problem.noise(range(seed, seed + 1)) * scale
        exact = sampler.serial(noise).sample
        other = sampler.serial(problem.noise(range(10**6 + seed, 10**6 + seed + 1)) * scale).sample
        for name, init in _guesses(args, problem, exact, other).items():
            runs.setdefault(name, []).append(_solve(sampler, noise, exact, init))
    return [{"steps": steps, "solver": solver, "guess": name, "runs": found} for name, found in runs.items()]


def _solve(sampler: dq.DEQSampler, noise: Tensor, exact: Tensor, init: Any) -> dict[str, Any]:
    """One solve, watched round by round."""
    curve: list[float] = []
    guess = init(noise) if callable(init) else init
    found = sampler.sample(
        noise,
        init=guess,
        callback=lambda info: curve.append(float(relative_error(info.sample(), exact).max())) or False,
    )
    within = next((k + 1 for k, error in enumerate(curve) if error <= TARGET), len(curve) + 1)
    return {
        "guess": None if guess is None else float(relative_error(guess, exact).max()), "curve": curve,
        "within": within, "rounds": found.stats.rounds, "error": float(relative_error(found.sample, exact).max()),
        "evaluations": found.stats.model_evals / sampler.schedule.num_steps,
    }  # fmt: skip


def _cells(row: dict[str, Any]) -> list[str]:
    runs = row["runs"]
    guessed = "" if runs[0]["guess"] is None else f"{median(run['guess'] for run in runs):.0e}"
    errors = [f"{median(run['curve'][min(k, len(run['curve']) - 1)] for run in runs):.0e}" for k in range(SHOWN)]
    each = [f"{median(run[name] for run in runs):g}" for name in ("within", "rounds")]
    spent = f"{median(run['evaluations'] for run in runs):.2f}"
    last = f"{max(run['error'] for run in runs):.0e}"
    return [str(row["steps"]), row["solver"], row["guess"], guessed, *errors, *each, spent, last]
