"""The campaign: thousands of random problems against plain loops, many solves in little memory, and injected faults.

    python tests/campaign/run.py                        # everything: about ten minutes on two cores
    python tests/campaign/run.py --problems 300 --solves 1000
    python tests/campaign/run.py --only 1234 --seed 0   # one problem again

The package is the one that is installed. Exit status 1: something was not as it should be; it is printed.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import files
import injected
import memory
import parallel
import problems
import report
import torch

import deqdiff_fast as dq

CHUNK = 10  # problems that a worker takes at a time


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def random_problems(args: argparse.Namespace) -> bool:
    """Problems args.first, args.first + 1, ... in several processes."""
    numbers = range(args.first, args.first + args.problems)
    print(f"problems {numbers.start} to {numbers.stop - 1}, seed {args.seed}", flush=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max(1, args.workers), mp_context=context) as pool:
        outcomes = []
        for one in pool.map(partial(problems.run, args.seed), numbers, chunksize=CHUNK):
            outcomes.append(one)
            if report.wrong(one) or report.worst(one) > report.WORST:
                print(report.problem_line(one, args.seed), flush=True)
    return report.report(outcomes)


def again(args: argparse.Namespace) -> int:
    """One problem by its number."""
    one = problems.run(args.seed, args.only)
    for name, value in one.plain().items():
        print(f"{name:12s} {value}")
    return int(report.wrong(one))


def checked(name: str, part: Callable[[], list[str]]) -> bool:
    """Run a part of the campaign, and print what it complains of."""
    started = time.monotonic()
    complaints = part()
    print(f"{name}: {'as it should be' if not complaints else 'WRONG'}, {time.monotonic() - started:.0f} s")
    for complaint in complaints:
        print(f"  {complaint}")
    sys.stdout.flush()
    return not complaints


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=3000, help="random problems (default 3000)")
    parser.add_argument("--solves", type=int, default=10_000, help="solves in little memory (default 10000)")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is random (default 0)")
    parser.add_argument("--first", type=int, default=0, help="number of the first problem (default 0)")
    parser.add_argument("--only", type=int, help="make this problem again, and nothing else")
    parser.add_argument("--workers", type=int, default=cores(), help="processes (default: one a core)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("deqdiff_fast").setLevel(logging.ERROR)  # what is injected is warned of, over and over
    print(f"deqdiff_fast {dq.__version__} in {os.path.dirname(dq.__file__)}, torch {torch.__version__}", flush=True)
    if args.only is not None:
        return again(args)
    fine = [
        checked("injected faults", lambda: injected.run(args.seed)),
        checked("threads and forks", lambda: parallel.run(args.seed)),
        checked("files", lambda: files.run(args.seed)),
        checked(f"{args.solves} solves", lambda: memory.run(args.solves, args.seed)),
    ]
    fine.append(random_problems(args) if args.problems else True)
    return int(not all(fine))


if __name__ == "__main__":
    sys.exit(main())
