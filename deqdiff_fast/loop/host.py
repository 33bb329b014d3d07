"""The loop: evaluate the active rows, let the solver step, slide past what has converged. It names no solver."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .device import iterate_on_device
from .stopping import StallDetector, relative_steps, reset_steps
from .task import Progress, Task
from .window import Window


def iterate(task: Task) -> Progress:
    """Solve `task.chain` in place until every row is final, the rounds run out, or `report` returns True.

    Raises:
        NonFiniteError: the model, and not the iterate, is to blame for NaN or Inf.
    """
    if task.solver.makes_rounds:
        return task.solver.solve(task)
    return iterate_on_host(task) if task.device.lookahead is None else iterate_on_device(task)


def iterate_on_host(task: Task) -> Progress:
    """`iterate` where the host looks at every round before it makes the next one."""
    chain, solver, rule = task.chain, task.solver, task.rule
    window = task.first_window()
    progress = Progress(window, task.rounds_before)
    previous, strict = torch.empty_like(chain.sq_diff), torch.ones_like(chain.sq_diff[0])
    reset_steps(previous)
    stalls = StallDetector(chain.batch, solver, rule.finish)
    while not window.done and progress.rounds < task.max_rounds and not progress.stopped:
        progress.rounds += 1
        lo, hi = list(window.lo), list(window.hi)
        chain.lo.copy_(torch.tensor(lo, dtype=torch.int32))
        chain.hi.copy_(torch.tensor(hi, dtype=torch.int32))
        task.evaluate(window.rows(), progress.rounds)
        solver.step(chain, task.memory, progress.rounds)
        rule.mark_converged(chain, previous, strict)
        if task.doubted is not None and progress.rounds == task.rounds_before + 1:
            rule.hold(chain, torch.tensor(task.doubted, device=chain.states.device))
        residual = relative_steps(chain).cpu()
        broken = _check_finite(task, residual, lo, hi, progress.rounds)
        worst = rule.advance(window, residual.t().tolist())
        solver.settle(chain, task.memory, progress.rounds, lo, list(window.lo))
        _let_in(task, window, hi, broken)
        progress.repairs += bool(broken)
        for b in stalls.update(worst):
            strict[b : b + 1].fill_(stalls.strict)
            task.restart_sample(window, b)
        progress.trace.append(torch.tensor(worst, dtype=residual.dtype))
        progress.stopped = task.report(progress.rounds, window, progress.trace[-1]) is True
    return progress


def _check_finite(task: Task, residual: Tensor, lo: list[int], hi: list[int], round: int) -> dict[int, int]:
    """Per sample, the first active row whose step is not finite; from there on residuals become Inf. Raises the error
    of a model that is to blame."""
    if math.isfinite(float(residual.sum())):
        return {}
    broken: dict[int, int] = {}
    for b, (start, stop) in enumerate(zip(lo, hi)):
        bad = ~residual[start:stop, b].isfinite()
        if bool(bad.any()):
            broken[b] = start + int(bad.int().argmax())
    for b, step in broken.items():
        task.blame(step, b, round)
        residual[step : hi[b], b] = float("inf")
    return broken


def _let_in(task: Task, window: Window, hi: list[int], broken: dict[int, int]) -> None:
    """Rows that enter the window, or that were lost to an overflow, get new states."""
    if broken:
        starts = [max(window.lo[b], broken[b]) if b in broken else hi[b] for b in range(len(hi))]
    else:
        starts = [max(a, b) for a, b in zip(hi, window.lo)]
    if any(a < b for a, b in zip(starts, window.hi)):
        entered = list(window.hi)
        task.solver.enter(task.chain, task.memory, starts, entered)
        task.rebuild(starts, entered, bool(broken))
