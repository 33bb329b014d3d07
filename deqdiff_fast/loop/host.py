"""The loop: evaluate the active rows, let the solver step, slide past what has converged. It names no solver."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from ..errors import NonFiniteError
from ..kernels.advance_window import limit
from .base import Chain, Solver, Stepper
from .device import DeviceState, Lookahead, iterate_on_device
from .stopping import TINY, StallDetector, forget, judge
from .task import Driver, Evaluate, Play, Progress, Rebuild, Task, restart_sample, run_eager
from .window import Window


def iterate(
    chain: Chain,
    solver: Solver,
    memory: Any,
    *,
    evaluate: Evaluate,
    rebuild: Rebuild,
    diagnose: Callable[[int, int, int], NonFiniteError | None],
    freeze: float,
    finish: float,
    max_rounds: int,
    report: Callable[[int, Window, Tensor], object],
    floor: float = 0.0,
    reach: float = 0.0,
    left: float = 0.0,
    before: Tensor | None = None,
    start: int = 0,
    made: int = 0,
    late: Lookahead | None = None,
    pad: Callable[[int], int] = int,
    play: Play = run_eager,
    board: DeviceState | None = None,
    warm: bool = False,
) -> Progress:
    """Solve `chain` in place until every row is final, the rounds run out, or `report` returns True.

    evaluate(rows, round) fills predictions; rebuild(old, new, broken) guesses the states of rows old[b] <= i < new[b],
    which enter the window or were lost to an overflow; diagnose(step, sample, round) says whether a non-finite row is
    the model's fault, and then returns the error. freeze, floor: see `contraction.judge`; finish: the relative step
    below which all rows must be for the solve to end. reach, left: a sample whose window is the whole chain may also
    end at steps up to `reach`, where they shrink so fast that less than `left` is left to go; before: (B,), the longest
    steps of the round before, if there was one. start: how many rows are final already; made: how many of
    max_rounds have been made. late: how far the host may run ahead of what it knows of a device (None: it looks at
    every round before the next one). pad: rows of a model call -> rows that it is made with; play: how a piece of
    device work that repeats is run; board: the memory that it needs on the device. These are for `late` only.
    warm: the states hold a trajectory that the caller gave. A solver that is a `Driver` makes the rounds itself.
    """
    task = Task(
        chain, cast(Stepper, solver), memory, evaluate, rebuild, diagnose, freeze, finish, max_rounds, report, floor,
        start, made, pad, play, board, warm, reach, left, before,
    )  # fmt: skip
    if callable(getattr(solver, "drive", None)):
        return cast(Driver, solver).drive(task)
    return _iterate_host(task) if late is None else iterate_on_device(task, late)


def _iterate_host(task: Task) -> Progress:
    chain, solver = task.chain, task.solver
    window = Window(chain.num_steps, chain.batch, chain.window, task.start)
    progress = Progress(window, task.made)
    previous = torch.empty_like(chain.sq_diff)
    forget(previous)
    by_step = bool(getattr(solver, "by_step", False))
    strict, vigil = torch.ones_like(previous[0]), StallDetector(chain.batch, solver, task.finish)
    ends, longest = task.ends(), torch.zeros(chain.batch, dtype=torch.float64)
    if task.before is not None:
        longest.copy_(task.before)
    while not window.done and progress.rounds < task.max_rounds and not progress.stopped:
        progress.rounds += 1
        lo, hi = list(window.lo), list(window.hi)
        chain.lo.copy_(torch.tensor(lo, dtype=torch.int32))
        chain.hi.copy_(torch.tensor(hi, dtype=torch.int32))
        task.evaluate(window.rows(), progress.rounds)
        solver.step(chain, task.memory, progress.rounds)
        if by_step:
            forget(previous)
        judge(chain.sq_diff, chain.sq_norm, previous, task.freeze, task.floor, strict, chain.backend)
        residual = (chain.sq_diff / chain.sq_norm.clamp_min(TINY)).sqrt_().cpu()
        broken = {} if math.isfinite(float(residual.sum())) else _first_broken(residual, lo, hi)
        for b, step in broken.items():
            error = task.diagnose(step, b, progress.rounds)
            if error is not None:
                raise error
            residual[step : hi[b], b] = float("inf")
        ending = limit(longest, *ends).tolist() if ends[1] > 0 else [task.finish] * chain.batch
        worst = window.advance(residual.t().tolist(), task.freeze, ending)
        longest = torch.tensor(worst, dtype=torch.float64)
        solver.settle(chain, task.memory, progress.rounds, lo, list(window.lo))
        if broken:
            progress.repairs += 1
            starts = [max(window.lo[b], broken[b]) if b in broken else hi[b] for b in range(chain.batch)]
        else:
            starts = [max(a, b) for a, b in zip(hi, window.lo)]
        if any(a < b for a, b in zip(starts, window.hi)):
            entered = list(window.hi)
            solver.enter(chain, task.memory, starts, entered)
            task.rebuild(starts, entered, bool(broken))
        for b in vigil.look(worst):
            strict[b : b + 1].fill_(vigil.strict)
            restart_sample(task, window, b)
            longest[b] = 0
        progress.trace.append(torch.tensor(worst, dtype=residual.dtype))
        progress.stopped = task.report(progress.rounds, window, progress.trace[-1]) is True
    return progress


def _first_broken(residual: Tensor, lo: list[int], hi: list[int]) -> dict[int, int]:
    """Per sample, the first active row whose step is not finite."""
    broken: dict[int, int] = {}
    for b, (start, stop) in enumerate(zip(lo, hi)):
        bad = ~residual[start:stop, b].isfinite()
        if bool(bad.any()):
            broken[b] = start + int(bad.int().argmax())
    return broken
