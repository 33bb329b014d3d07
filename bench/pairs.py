"""Pairs a second: `distillation.Pairs.make` against plain loops over batches of several sizes, taking turns.

The loops draw the same noises and go through DDIM's steps by hand, and keep nothing. `Pairs.make` chooses its batch and
method by its own timing, as for 10,000 pairs, and its time has everything in it: files, checksums, and looking at what
is there already.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from deqdiff_fast.distillation import Pairs
from deqdiff_fast.distillation.pair_plan import choose_method
from deqdiff_fast.distillation.pair_solver import PairSolver, pair_seed
from deqdiff_fast.distillation.teacher import inputs_like

from ._common import environment, markdown, note, positive_int, spread, summary, write_json
from ._problems import Problem, add_model_arguments, load

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
WHOLE = 10_000
LAST = ", channels_last"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--steps", type=positive_int, default=50, help="T (default 50)")
    parser.add_argument("--batches", type=positive_int, nargs="+", default=[16, 32, 64], help="of the plain loops")
    parser.add_argument("--pairs", type=positive_int, default=64, help="made by each side in a turn (default 64)")
    parser.add_argument("--turns", type=positive_int, default=3, help="default 3")
    parser.add_argument("--channels-last", action="store_true", help="each plain loop in that memory format as well")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall", help="cpu: what others do does not count")


def run(args: argparse.Namespace) -> int:
    problem, facts, clock = load(args), environment(args.device), CLOCKS[args.clock]
    schedule, like = problem.schedule(args.steps, 0.0), inputs_like(problem.model, args.device)
    aids = {name: aid for name, aid in problem.aids.items() if aid is not None}
    solver = PairSolver(problem.model, schedule, problem.shape, None, like, args.seed, **aids)
    method = choose_method(solver, WHOLE, "auto", None)
    note(f"{method.name}, {method.batch} at a time{LAST if method.channels_last else ''}")
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():

        def make(count: int) -> None:
            Pairs.make(
                problem.model, schedule, problem.shape, count, Path(folder), method=method.name, batch=method.batch,
                channels_last=method.channels_last, seed=args.seed, **aids,
            )  # fmt: skip

        make(1)
        for turn in range(args.turns):
            sides: dict[str, Callable[[], Any]] = {
                f"loop, batch {size}{LAST if last else ''}": lambda size=size, last=last: [
                    _loop(problem, schedule, args.seed, start, size, last) for start in range(0, args.pairs, size)
                ]
                for size in args.batches
                for last in ((False, True) if args.channels_last else (False,))
            }
            sides[f"Pairs, {method.name}, batch {method.batch}{LAST if method.channels_last else ''}"] = (
                lambda turn=turn: make(method.batch + (turn + 1) * args.pairs)
            )
            for name, side in sides.items():
                began = clock()
                side()
                seconds.setdefault(name, []).append((clock() - began) / args.pairs)
                note(f"turn {turn + 1}, {name}: {seconds[name][-1]:.3g} s a pair")
            rows = [{"side": name, "seconds": taken} for name, taken in seconds.items()]
            write_json(args, facts, rows)
    best = min(median(taken) for name, taken in seconds.items() if name.startswith("loop"))
    print(f"{summary(facts)}\n{problem.name}, T = {args.steps}, {args.clock} seconds of {args.pairs} pairs a turn\n")
    cells = [(name, spread(taken, ".3g"), f"{best / median(taken):.3f}") for name, taken in seconds.items()]
    print(markdown(("side", "seconds a pair", "rate against the fastest loop"), cells))
    return 0


def _loop(problem: Problem, schedule: Any, seed: int, start: int, size: int, last: bool = False) -> Tensor:
    """What somebody would write: the samples of that many noises."""
    streams = [torch.Generator().manual_seed(pair_seed(seed, k)) for k in range(start, start + size)]
    x = torch.stack([torch.randn(problem.shape, generator=stream) for stream in streams]).to(problem.device)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    state, model = schedule.state_coef[:, 0].tolist(), schedule.model_coef[:, 0].tolist()
    p, q = schedule.denoised_coef().T.tolist()
    for i, t in enumerate(schedule.timesteps.to(problem.device)):
        said = problem.model(x, t.expand(size))
        said = getattr(said, "sample", said)
        if schedule.clip is not None:
            clean = p[i] * x + q[i] * said
            said = said + float(schedule.clip.gain[i]) * (
                clean.clamp(-schedule.clip.range, schedule.clip.range) - clean
            )
        x = state[i] * x + model[i] * said
    return x
