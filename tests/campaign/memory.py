"""Many solves of many shapes in one process: the memory that it holds must not grow."""

from __future__ import annotations

import gc
import random
import sys
from pathlib import Path
from typing import Any

import torch
from problems import random_problem

import deqdiff_fast as dq
from deqdiff_fast.memory import default_memory

GROWTH = 24 * 2**20  # bytes
SAMPLERS = 12  # that are alive at a time
LARGEST = 20_000  # numbers in a trajectory: many solves, not long ones


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def overflows(sampler: dq.DEQSampler, noise: Any, kwargs: Any, generator: torch.Generator) -> bool:
    """Whether the serial chain is not finite either."""
    try:
        with torch.no_grad():
            sampler.serial(noise, kwargs, generator)
    except dq.NonFiniteError:
        return True
    return False


def run(solves: int, seed: int) -> list[str]:
    """A pool of samplers, one of which is replaced by a new one now and then. Returns complaints."""
    if not Path("/proc/self/statm").is_file():
        print("  (skipped: this system does not tell how much memory a process holds)", file=sys.stderr)
        return []
    draw, number, pool, marks, wrong = random.Random(seed), 10**6, [], [], 0
    for k in range(solves):
        if len(pool) < SAMPLERS or draw.random() < 0.05:
            problem, number = random_problem(seed, number), number + 1
            while problem.noises[0].numel() * problem.chain.schedule.num_steps > LARGEST:
                problem, number = random_problem(seed, number), number + 1
            settings = problem.settings | {"on_failure": "serial"}
            item = (problem, dq.DEQSampler(problem.model, problem.chain.schedule, **settings))
            pool = [*pool[-SAMPLERS + 1 :], item]
        problem, sampler = draw.choice(pool)
        asked = (draw.choice(problem.noises), problem.kwargs)
        try:
            with torch.no_grad():
                found = sampler.sample(*asked, torch.Generator().manual_seed(k))
            wrong += not bool(found.sample.isfinite().all())
        except dq.NonFiniteError:
            wrong += not overflows(sampler, *asked, torch.Generator().manual_seed(k))
            pool.remove((problem, sampler))
        if k % max(1, solves // 20) == 0:
            gc.collect()
            marks.append(resident())
    half = marks[len(marks) // 2 :]
    print("  resident MB:", " ".join(f"{mark / 2**20:.0f}" for mark in marks))
    complaints = [f"{wrong} solves with values that are not finite"] if wrong else []
    if len(half) > 2 and min(half[-2:]) - half[0] > GROWTH:
        complaints.append(f"the process has grown by {(min(half[-2:]) - half[0]) / 2**20:.0f} MB in the second half")
    pool.clear()
    gc.collect()
    stats = default_memory().stats()
    if stats["active"]:
        complaints.append(f"leases that were not given back: {stats}")
    return complaints
