"""The loop: evaluate the active rows, let the solver step, slide past what has converged. It names no solver."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .._types import Rows
from ..errors import NonFiniteError
from .base import Chain, Solver
from .window import Window

TINY = 1e-30  # keeps 0 / 0 a zero residual; Inf / Inf and NaN stay NaN

Evaluate = Callable[[Rows, int], None]
Rebuild = Callable[[list[int], list[int], bool], None]


@dataclass
class Progress:
    """What the loop did."""

    window: Window
    rounds: int = 0
    trace: list[Tensor] = field(default_factory=list)
    repairs: int = 0
    stopped: bool = False


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
    start: int = 0,
) -> Progress:
    """Solve `chain` in place until every row is final, the rounds run out, or `report` returns True.

    evaluate(rows, round) fills predictions; rebuild(old, new, broken) guesses the states of rows old[b] <= i < new[b],
    which enter the window or were lost to an overflow; diagnose(step, sample, round) says whether a non-finite row is
    the model's fault, and then returns the error. start: how many rows are final already.
    """
    window = Window(chain.num_steps, chain.batch, chain.window, start)
    progress = Progress(window)
    while not window.done and progress.rounds < max_rounds and not progress.stopped:
        progress.rounds += 1
        lo, hi = list(window.lo), list(window.hi)
        chain.lo.copy_(torch.tensor(lo, dtype=torch.int32))
        chain.hi.copy_(torch.tensor(hi, dtype=torch.int32))
        evaluate(window.rows(), progress.rounds)
        solver.step(chain, memory, progress.rounds)
        residual = (chain.sq_diff / chain.sq_norm.clamp_min(TINY)).sqrt().cpu()
        broken = _first_broken(residual, lo, hi)
        for b, step in broken.items():
            error = diagnose(step, b, progress.rounds)
            if error is not None:
                raise error
            residual[step : hi[b], b] = float("inf")
        old_lo, new_lo, old_hi, new_hi = window.advance(residual, freeze, finish)
        solver.settle(chain, memory, progress.rounds, old_lo, new_lo)
        if broken:
            progress.repairs += 1
            starts = [max(new_lo[b], broken[b]) if b in broken else old_hi[b] for b in range(chain.batch)]
        else:
            starts = [max(a, b) for a, b in zip(old_hi, new_lo)]
        if any(a < b for a, b in zip(starts, new_hi)):
            solver.enter(chain, memory, starts, new_hi)
            rebuild(starts, new_hi, bool(broken))
        worst = window.worst(residual, lo, hi)
        progress.trace.append(worst)
        progress.stopped = report(progress.rounds, window, worst) is True
    return progress


def _first_broken(residual: Tensor, lo: list[int], hi: list[int]) -> dict[int, int]:
    """Per sample, the first active row whose step is not finite."""
    broken: dict[int, int] = {}
    for b, (start, stop) in enumerate(zip(lo, hi)):
        bad = ~residual[start:stop, b].isfinite()
        if bool(bad.any()):
            broken[b] = start + int(bad.int().argmax())
    return broken
