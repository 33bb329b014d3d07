"""Whether `sample()` is ever slower than a loop that the model's author would write: paired timings, with the plan."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

import deqdiff_fast as dq

from . import _policy
from ._common import environment, markdown, note, positive_float, positive_int, spread, summary, write_json
from ._problems import Problem, load
from ._timing import CLOCKS, Side, interleave, ratios
from .zoo import _loops

FLOOR = 0.95  # loop / sample() must not be below this anywhere
SAME = 1e-3  # the loop's sample is the serial chain's but for rounding
PROBLEMS = ("bundled", "mixture", "policy")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--problems", nargs="+", default=list(PROBLEMS), metavar="NAME",
        help=f"of {', '.join(PROBLEMS)} (default: all), or diffusers folders",
    )  # fmt: skip
    parser.add_argument("--alone", action="store_true", help="without the draft and the spectrum that a model brings")
    parser.add_argument("--steps", type=positive_int, nargs="+", default=[20, 50, 100], help="T (default 20 50 100)")
    parser.add_argument("--batches", type=positive_int, nargs="+", default=[1, 4, 16], help="B (default 1 4 16)")
    parser.add_argument("--size", type=positive_int, default=32, help="image size of the mixture (default 32)")
    parser.add_argument("--fit", type=positive_int, default=1000, help="training steps of the policy (default 1000)")
    parser.add_argument("--noises", type=positive_int, default=1, help="noises, --passes pairs with each (default 1)")
    parser.add_argument("--passes", type=positive_int, default=25, help="pairs of timings (default 25)")
    parser.add_argument(
        "--budget", type=positive_float, default=10.0, help="seconds for a side, after which 3 pairs do (default 10)"
    )
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="default wall; cpu: of one busy thread")
    parser.add_argument("--cold", action="store_true", help="without sampler.warmup: sample() measures as it goes")
    parser.add_argument("--plans", action="store_true", help="print every plan in full")
    parser.add_argument("--check", action="store_true", help=f"exit 1 where a median ratio is below {FLOOR}")


def problem_of(name: str, args: argparse.Namespace) -> Problem:
    if name == "policy":
        return _policy.problem(args.device, args.fit)
    return load(argparse.Namespace(model=name, size=args.size, device=args.device, alone=args.alone))


def author_loop(problem: Problem, schedule: dq.Schedule) -> Callable[[Tensor], Tensor]:
    """The chain of a DDIM schedule as the model's author would write it, with the noise levels that the model knows."""
    abar = torch.ones(int(schedule.timesteps.max()) + 1, dtype=torch.float64)
    abar[schedule.timesteps] = schedule.signal[:-1].square()
    velocity, model = schedule.prediction_type == "v_prediction", problem.model

    def predict(x: Tensor, t: Tensor) -> Tensor:
        out = model(x, t)
        return out if isinstance(out, Tensor) else out.sample

    return lambda noise: _loops.ddim(predict, noise, abar, schedule.timesteps, velocity=velocity)


def run(args: argparse.Namespace) -> int:
    facts, rows = environment(args.device), []
    for name in args.problems:
        problem = problem_of(name, args)
        for steps in args.steps:
            for batch in args.batches:
                note(f"{name}, T = {steps}, B = {batch} ...")
                rows.append(_row(args, name, problem, steps, batch))
                write_json(args, facts, rows)
    header = (
        "problem",
        "T",
        "B",
        "loop",
        "serial",
        "sample()",
        "loop / serial",
        "loop / sample()",
        "plan",
        "rounds",
        "evaluations / T",
        "error",
    )
    print(f"{summary(facts)}\nDDIM, eta 0, {'cold' if args.cold else 'warmed up'}\n")
    print(markdown(header, [_cells(row) for row in rows]))
    worst = min(rows, key=lambda row: median(row["ratios"]))
    verdict = "PASS" if median(worst["ratios"]) >= FLOOR else "FAIL"
    print("\nloop: as the model's author would write it, plain torch. serial: `sampler.serial`.", end="")
    print(
        f"\nMedians of paired timings with (smallest..largest). Lowest ratio {median(worst['ratios']):.2f} "
        f"({worst['problem']}, T = {worst['steps']}, B = {worst['batch']}); at least {FLOOR}: {verdict}"
    )
    return 1 if args.check and verdict == "FAIL" else 0


def _row(args: argparse.Namespace, name: str, problem: Problem, steps: int, batch: int) -> dict[str, Any]:
    schedule = problem.schedule(steps, 0.0)
    sampler, loop = dq.DEQSampler(problem.model, schedule, **problem.aids), author_loop(problem, schedule)
    with torch.no_grad():
        started = time.perf_counter()
        if not args.cold:
            sampler.warmup(problem.shape, batch=batch, device=args.device)
        warmup = time.perf_counter() - started
        if args.plans:
            print(f"{name}: {sampler.plan(problem.shape, batch=batch, device=args.device)}\n", flush=True)
        runs: list[dq.Stats] = []
        seconds: dict[str, list[float]] = {"loop": [], "serial": [], "sample": []}
        paired, of_serial = list[float](), list[float]()
        sides = [
            Side("loop", lambda: loop(noise)),
            Side("serial", lambda: sampler.serial(noise)),
            Side("sample", lambda: runs.append(sampler.sample(noise).stats)),
        ]
        for first in range(0, args.noises * batch, batch):
            noise = problem.noise(range(first, first + batch))
            interleave(sides, args.device, passes=args.passes, budget=args.budget, clock=args.clock, warm=first == 0)
            paired += ratios(sides[0], sides[2])
            of_serial += ratios(sides[0], sides[1])
            for side in sides:
                seconds[side.name] += side.seconds
                side.seconds = []
        reference, out = sampler.serial(noise).sample, sampler.sample(noise)
        by_hand = float(((loop(noise) - reference).flatten(1).norm(dim=1) / reference.flatten(1).norm(dim=1)).max())
    if not by_hand < SAME:
        raise RuntimeError(f"{name}: the loop is another chain, {by_hand:.1e} from sampler.serial")
    apart = (out.sample - reference).flatten(1).norm(dim=1) / reference.flatten(1).norm(dim=1)
    return {
        "problem": name, "steps": steps, "batch": batch, "ratios": paired, "warmup_seconds": warmup,
        "serial_ratios": of_serial, "loop_error": by_hand,
        **{f"{side}_seconds": taken for side, taken in seconds.items()}, "error": float(apart.max()),
        "solver": runs[-1].solver, "windows": [stats.window for stats in runs],
        "rounds": median(stats.rounds for stats in runs),
        "evaluations": median(stats.model_evals for stats in runs) / (steps * batch),
        "reasons": sorted({stats.stop_reason for stats in runs}), "plan": str(out.stats.plan),
    }  # fmt: skip


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    windows = sorted(set(row["windows"]))
    named = ["serial" if w == 1 else "all" if w == row["steps"] else f"window {w}" for w in windows]
    return (
        row["problem"], str(row["steps"]), str(row["batch"]),
        *(f"{1e3 * median(row[f'{side}_seconds']):.3g} ms" for side in ("loop", "serial", "sample")),
        spread(row["serial_ratios"]), spread(row["ratios"]), ", ".join(named), f"{row['rounds']:g}",
        f"{row['evaluations']:.2f}", f"{row['error']:.1e}",
    )  # fmt: skip
