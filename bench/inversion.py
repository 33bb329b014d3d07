"""Inversion: the paper's comparison of descents with equilibrium inversion, and round trips of the direct methods.

Descents: the noise is optimised until the squared loss is 0.5 (or the epochs or seconds run out), from the same random
noise and for the same images: "bptt" through the serial chain with activation checkpointing, "phantom" with the paper's
settings for CIFAR-10, "implicit" with the gradient of the equilibrium. The direct methods use no gradient. All losses
and errors are those of the serial chain from the noise that a method returns (or, on the curves, has so far).
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import deqdiff_fast as dq
from deqdiff_fast.inversion.counting_model import CountingModel
from deqdiff_fast.presets import inversion_preset
from deqdiff_fast.solver import NAMED as SOLVERS

from ._common import environment, markdown, note, positive_float, positive_int, summary, write_json
from ._float64 import quicken
from ._images import images
from ._inversion_tables import comparison, descents, round_trips
from ._problems import Problem, add_model_arguments, load, warm_up

DIRECT = ("ddim", "fixed_point", "equilibrium", "auto")
DESCENTS = ("bptt", "phantom", "implicit")
OTHER_NOISE = 10**5  # images that the model made must not be sought from the noise that made them
THINNING = 1.25  # a point of a curve for every so many times the evaluations of the one before


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--steps", type=positive_int, nargs="+", default=[10, 20, 100], help="T (default 10 20 100)")
    parser.add_argument("--eta", type=float, default=0.0, help="default 0")
    parser.add_argument("--data", type=Path, metavar="PATH", help="CIFAR-10 (default: images made by the model itself)")
    parser.add_argument("--images", type=positive_int, default=16, help="images of the round trips (default 16)")
    parser.add_argument("--descent-images", type=positive_int, default=1, help="images of the descents (default 1)")
    parser.add_argument("--epochs", type=positive_int, default=300, help="most optimizer steps (default 300)")
    parser.add_argument(
        "--stop", type=positive_float, default=0.5, help="squared loss that ends a descent (default 0.5)"
    )
    parser.add_argument("--seconds", type=positive_float, default=300.0, help="most for one descent (default 300)")
    parser.add_argument("--tol", type=positive_float, help="relative error the direct methods aim at (default 1e-3)")
    parser.add_argument("--methods", nargs="+", choices=(*DIRECT, *DESCENTS), help="default: all")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32", help="of model and images")
    parser.add_argument(
        "--solver", choices=tuple(SOLVERS), default="auto", help="of the descent 'implicit' (default auto, planned)"
    )
    parser.add_argument(
        "--ends-only", action="store_true", help="no losses on the way, which cost a serial chain each, and no depth"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="PNG of squared loss against seconds and evaluations")


def run(args: argparse.Namespace) -> int:
    wanted = args.methods or [*DESCENTS, *DIRECT]
    if args.plot is not None:
        from . import _plot  # refuse before the work, not after it
    problem, facts, dtype = load(args), environment(args.device), getattr(torch, args.dtype)
    warm_up(problem)
    if isinstance(problem.model, torch.nn.Module):
        problem.model.to(dtype)
        quicken(problem.model)
    rows: list[dict[str, Any]] = []
    for steps in args.steps:
        for table, count in (("round trip", args.images), ("descent", args.descent_images)):
            seeds = range(args.seed, args.seed + count)
            target = images(problem, args.data, seeds, dtype)
            for name in wanted:
                if table == "descent" or name in DIRECT:
                    note(f"T = {steps}, {table}, {count} images: {name} ...")
                    rows.append(_measure(args, problem, steps, table, name, target, seeds))
                    write_json(args, facts, rows)
    source = "images made by the model" if args.data is None else f"images of {args.data.name}"
    print(f"{summary(facts)}\n{problem.name}, eta {args.eta:g}, {source}\n")
    for title, (header, cells, remark) in {
        f"Round trips, {args.images} images as one batch": round_trips(rows),
        f"The paper's comparison, {args.descent_images} images as one batch": descents(rows),
        "Evaluations to the loss at which the paper's method (phantom) stopped": comparison(rows),
    }.items():
        if cells:
            print(f"{title}\n\n{markdown(header, cells)}\n\n{remark}\n")
    if args.plot is not None:
        _plot.loss_curves([row for row in rows if row["table"] == "descent"], args.plot, problem.name)
        note(f"wrote {args.plot}")
    return 0


def _options(args: argparse.Namespace, name: str, noise: Tensor, problem: Problem) -> dict[str, Any]:
    """Arguments of the inverter."""
    if name in DIRECT:
        return {"method": name, "tol": args.tol, "spectrum": problem.spectrum}
    paper = inversion_preset("cifar10")
    shared = {"steps": args.epochs, "stop": args.stop, "initial": noise}
    if name == "implicit":
        own = {"gradient": dq.Implicit(tol=1e-2), "solver": args.solver, "solver_tol": 1e-2, "lr": paper.baseline_lr}
        return {"method": "gradient", "spectrum": problem.spectrum} | own | shared
    return (paper.baseline() if name == "bptt" else paper.options()) | shared


@dataclass
class CurveRecorder:
    """Stores the running noise of a solve, for curves that are computed afterwards; stops what takes too long."""

    model: CountingModel
    images: int
    limit: float
    ends_only: bool = False
    start: float = field(default_factory=time.perf_counter)
    seconds: float = 0.0
    points: list[tuple[float, int, int, int, Tensor]] = field(default_factory=list)

    def __call__(self, info: Any) -> bool:
        self.seconds = time.perf_counter() - self.start
        whole = len(info.front) == self.images  # a further attempt may be about some of them: the last point has it
        if whole and not self.ends_only and (not self.points or self.model.evals >= THINNING * self.points[-1][1]):
            own = self.model.evals - self.model.backpropagations
            self.points.append((self.seconds, self.model.evals, own, info.round, info.noise()))
        return self.seconds > self.limit


def _measure(
    args: argparse.Namespace, problem: Problem, steps: int, table: str, name: str, target: Tensor, seeds: range
) -> dict[str, Any]:
    """One method on one batch."""
    schedule = problem.schedule(steps, args.eta)
    noise = problem.noise(range(seeds.start + OTHER_NOISE, seeds.stop + OTHER_NOISE)).to(target)
    noise = noise * schedule.init_noise_sigma
    model = CountingModel(problem.model)
    inverter = dq.DEQInverter(model, schedule, max_batch=args.max_batch, **_options(args, name, noise, problem))
    serial = dq.DEQSampler(problem.model, schedule, max_batch=args.max_batch)

    def losses(start: Tensor) -> list[float]:
        made = serial.serial(start, generator=problem.generators(seeds)).sample
        return (made - target).flatten(1).double().square().sum(1).tolist()

    recorder = CurveRecorder(model, len(target), args.seconds if name in DESCENTS else float("inf"), args.ends_only)
    found = inverter.invert(target, generator=problem.generators(seeds) if args.eta else None, callback=recorder)
    stats = found.stats
    own = stats.model_evals - getattr(stats, "backpropagations", 0)
    curve = [
        (seconds, evals, forward, median(losses(start)), rounds)
        for seconds, evals, forward, rounds, start in recorder.points
    ]
    final = losses(found.noise)
    curve.append((recorder.seconds, stats.model_evals, own, median(final), stats.rounds))
    return {
        "steps": steps, "table": table, "method": name, "images": len(target), "losses": final,
        "errors": found.error.tolist(), "converged": found.converged.tolist(), "evaluations": stats.model_evals,
        "forward_evaluations": own, "backpropagations": getattr(stats, "backpropagations", 0),
        "rounds": stats.rounds, "optimizer_steps": getattr(stats, "steps", 0), "seconds": recorder.seconds,
        "stop_reason": stats.stop_reason, "notes": stats.notes, "curve": curve,
    }  # fmt: skip
