"""What the default tolerance is worth: asked tolerance against true error, over many noises and many small problems.

Two parts. On each model: `--noises` noises at every tolerance, the error of each converged sample against the serial
chain. On random problems: mixtures whose dimension, sharpness, number of components, schedule, T and eta are drawn at
random, and for the solver "draft" drafts that are wrong by as much. A sample that is called converged and is further
off than three times the tolerance is a false promise.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import deqdiff_fast as dq
from deqdiff_fast.loop.base import Solver

from ._common import environment, markdown, note, positive_float, positive_int, summary, write_json
from ._problems import ABAR, TRAIN_STEPS, Mixture, Problem, add_model_arguments, load, relative_error, solvers

FALSE = 3.0  # times the tolerance


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--steps", type=positive_int, nargs="+", default=[50], help="T (default 50)")
    parser.add_argument("--eta", type=float, nargs="+", default=[0.0, 0.5], help="default 0 0.5")
    parser.add_argument("--tol", type=positive_float, nargs="+", default=[1e-2, 1e-4], help="default 1e-2 1e-4")
    parser.add_argument("--noises", type=positive_int, default=200, help="noises of each cell (default 200)")
    parser.add_argument("--batch", type=positive_int, default=8, help="noises in one solve (default 8)")
    parser.add_argument("--random", type=int, default=1000, help="random small problems (default 1000; 0 for none)")
    parser.add_argument("--solver", default="quasi-newton", metavar="NAME", help="default quasi-newton")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="PNG of true error against asked tolerance")
    parser.add_argument("--check", action="store_true", help="exit status 1 if a promise is broken")


def run(args: argparse.Namespace) -> int:
    problem, facts, rows = load(args), environment(args.device), []
    (solver,) = solvers([args.solver], drafted=True).values()
    for steps in args.steps:
        for eta in args.eta:
            for tol in args.tol:
                rows.append(_cell(args, problem, solver, steps, eta, tol))
                note(f"T = {steps}, eta = {eta:g}, tol {tol:g}: largest error {max(rows[-1]['errors']):.1e}")
                write_json(args, facts, rows)
    if args.random:
        rows += [_random_problems(args, solver, tol) for tol in args.tol]
        write_json(args, facts, rows)
    print(f"{summary(facts)}\n{problem.name}, {args.solver}, noises from seed {args.seed}\n")
    header = (
        "problem",
        "T",
        "eta",
        "tol",
        "converged",
        "median error",
        "99.5 %",
        "largest",
        "> tol",
        "> 3 tol",
        "verdict",
    )
    print(markdown(header, [_line(row) for row in rows]))
    if args.plot is not None:
        _plot(rows, args.plot)
        note(f"wrote {args.plot}")
    return int(args.check and not all(_holds(row) for row in rows))


def _cell(
    args: argparse.Namespace, problem: Problem, solver: Solver, steps: int, eta: float, tol: float
) -> dict[str, Any]:
    """One model, schedule and tolerance over all noises."""
    schedule, errors, converged = problem.schedule(steps, eta), [], []
    sampler = dq.DEQSampler(problem.model, schedule, solver=solver, tol=tol, max_batch=args.max_batch, **problem.aids)
    for first in range(args.seed, args.seed + args.noises, args.batch):
        seeds = range(first, min(first + args.batch, args.seed + args.noises))
        _judge(sampler, problem.noise(seeds), problem.generators(seeds), errors, converged)
    return {"problem": problem.name, "steps": steps, "eta": eta, "tol": tol, "errors": errors, "converged": converged}


def _random_problems(args: argparse.Namespace, solver: Solver, tol: float) -> dict[str, Any]:
    """Two noises on each of many random mixtures."""
    errors: list[float] = []
    converged: list[bool] = []
    for k in range(args.random):
        draw = torch.Generator().manual_seed(10**5 + k)

        def pick(low: float, high: float, draw: torch.Generator = draw) -> float:
            return low + (high - low) * float(torch.rand((), generator=draw))

        shape = [(3, 4, 4), (1, 8, 8), (12,), (4, 9)][int(pick(0, 4))]
        model = Mixture(shape, components=int(pick(1, 9)), variance=10 ** pick(-2, 0))
        steps, eta = [5, 10, 20, 50, 100][int(pick(0, 5))], [0.0, 0.0, 0.3, 1.0][int(pick(0, 4))]
        timesteps = torch.arange(steps).flip(0) * (TRAIN_STEPS // steps)
        draft = _poor_draft(model, 10 ** pick(-2, 0.5, torch.Generator().manual_seed(k)))
        schedule = dq.Schedule.ddim(ABAR, timesteps, eta=eta)
        sampler = dq.DEQSampler(model, schedule, solver=solver, tol=tol, draft=draft)
        noise = torch.randn(2, *shape, generator=draw)
        generators = [torch.Generator().manual_seed(10 * k + b) for b in range(2)]
        _judge(sampler, noise, generators, errors, converged)
        if errors[-1] > FALSE * tol:
            note(f"random problem {k}: error {errors[-1]:.1e}")
    name = f"{args.random} random mixtures"
    return {"problem": name, "steps": "", "eta": "", "tol": tol, "errors": errors, "converged": converged}


def _poor_draft(model: Mixture, size: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The model with an error of about that size, and a Jacobian that is wrong by three times as much."""
    return lambda x, t: model(x, t) + size * torch.sin(3 * x)


def _judge(
    sampler: dq.DEQSampler, noise: Tensor, generators: list[torch.Generator], errors: list[float],
    converged: list[bool],
) -> None:  # fmt: skip
    states = [g.get_state() for g in generators]
    out = sampler.sample(noise, generator=generators)
    for g, state in zip(generators, states):
        g.set_state(state)
    errors += relative_error(out.sample, sampler.serial(noise, generator=generators).sample).tolist()
    # a chain that was finished serially from its last final state has a promise of its own: it counts as converged too
    converged += out.converged.tolist()


def _promised(row: dict[str, Any]) -> list[float]:
    return sorted(error for error, sure in zip(row["errors"], row["converged"]) if sure)


def _holds(row: dict[str, Any]) -> bool:
    """At most one in 200 further off than asked, none further than three times that."""
    found, tol = _promised(row), row["tol"]
    return sum(error > tol for error in found) <= len(found) / 200 and all(error <= FALSE * tol for error in found)


def _line(row: dict[str, Any]) -> tuple[str, ...]:
    found, tol = _promised(row), row["tol"]
    if not found:
        return (row["problem"], str(row["steps"]), f"{row['eta']}", f"{tol:g}", "0", *[""] * 5, "nothing converged")
    return (
        row["problem"], str(row["steps"]), f"{row['eta']}", f"{tol:g}", f"{len(found)} of {len(row['errors'])}",
        f"{found[len(found) // 2]:.1e}", f"{found[int(0.995 * (len(found) - 1))]:.1e}", f"{found[-1]:.1e}",
        str(sum(error > tol for error in found)), str(sum(error > FALSE * tol for error in found)),
        "PASS" if _holds(row) else "FAIL",
    )  # fmt: skip


def _plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 5), layout="constrained")
    names = list(dict.fromkeys((row["problem"], row["steps"], row["eta"]) for row in rows))
    for k, name in enumerate(names):
        mine = [row for row in rows if (row["problem"], row["steps"], row["eta"]) == name]
        x = [row["tol"] * 1.06 ** (k - len(names) / 2) for row in mine for _ in _promised(row)]
        y = [max(error, 1e-9) for row in mine for error in _promised(row)]
        label = name[0] if name[1] == "" else f"{name[0]}, T = {name[1]}, eta = {name[2]:g}"
        axes.loglog(x, y, ".", ms=3, label=label)
    asked = sorted({row["tol"] for row in rows})
    axes.loglog(asked, asked, "k-", lw=1, label="as asked")
    axes.set(xlabel="asked tolerance", ylabel="relative L2 error of a converged sample")
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
