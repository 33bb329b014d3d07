"""Small models that the repository trains itself, of the kinds that users bring: what the library makes of each, with
nothing known of them. Rounds, evaluations and error of one sample at a time (B = 1) as medians over noises, and
`sample()` with its defaults in paired timings with the loop that a model's author would write.

Training takes about six minutes on one thread, once; the weights are kept in build/zoo.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .._common import environment, note, positive_float, positive_int, summary, write_json
from .._timing import CLOCKS
from . import _cache
from ._measure import DEFAULT_TOL, FALSE, HAS_WEIGHT, TIGHT, measure
from ._members import MEMBERS, Chain
from ._table import table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    described = "; ".join(f"{name}: {member.what}" for name, member in MEMBERS.items())
    parser.add_argument(
        "--models", nargs="+", choices=tuple(MEMBERS), default=list(MEMBERS), help=f"default: all. {described}"
    )
    parser.add_argument("--steps", type=positive_int, nargs="+", help="T in place of each model's own")
    parser.add_argument("--tol", type=positive_float, help=f"asked of every solve (default {DEFAULT_TOL:g})")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first noise (default 0)")
    parser.add_argument("--noises", type=positive_int, default=8, help="noises, seeded one after the other (default 8)")
    parser.add_argument("--passes", type=positive_int, default=5, help="pairs of timings for each noise (default 5)")
    parser.add_argument(
        "--budget",
        type=positive_float,
        default=3.0,
        help="seconds of sample() for a row, after which no more noises are timed (default 3)",
    )
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall", help="cpu: processor time, on one thread")
    parser.add_argument("--fit", type=positive_int, help="training steps, in place of each model's own")
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="trained weights (default build/zoo)")
    parser.add_argument("--train-only", action="store_true", help="train what the cache lacks, and measure nothing")


def run(args: argparse.Namespace) -> int:
    facts = environment(args.device)
    rows: list[dict[str, Any]] = []
    for name in args.models:
        member = MEMBERS[name]
        net = member.net(args.cache or _cache.FOLDER, args.fit, args.device)
        for chain in () if args.train_only else _chains(args, name):
            note(f"{name}, T = {chain.steps}, eta = {chain.eta:g} ...")
            rows.append(measure(args, member, net, chain))
            write_json(args, facts, rows)
    if args.train_only:
        return 0
    told = "told" if HAS_WEIGHT else "not told"
    print(
        f"{summary(facts)}\nB = 1, medians over {args.noises} noises from seed {args.seed}, "
        f"tol {args.tol or DEFAULT_TOL:g}; errors over the entries that are used, which the library is {told}\n"
    )
    print(table(rows))
    print(
        f"\n*: some solve had ended before; counted in one at tol {TIGHT:g}. false: converged with an error above "
        f"{FALSE:g} tol, of the solves\nby rounds and of sample(). loop / sample(): paired, median (smallest..largest)."
    )
    return 0


def _chains(args: argparse.Namespace, name: str) -> list[Chain]:
    own = MEMBERS[name].chains
    if args.steps is None:
        return list(own)
    return [Chain(steps, eta) for steps in args.steps for eta in dict.fromkeys(chain.eta for chain in own)]
