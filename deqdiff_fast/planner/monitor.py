"""Watches a running solve: how long its rounds take, and whether the serial chain would be there sooner."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..engine.progress import Reporter
from ..plan import Plan
from .decide import give_up, work_left

FIRST_LOOK = 2  # rounds before which nothing is given up: the first one of its size is slow


class SlowSolveMonitor:
    """Called in the reporter's place after every round. `gave_up` says that it was the monitor that stopped the solve.

    step: seconds of a serial step. front: steps that were made before the first round. clock: seconds.
    """

    def __init__(self, plan: Plan, step: float, front: int, clock: Callable[[], float]) -> None:
        self.plan, self.step, self.front, self.clock = plan, step, front, clock
        self.gave_up = False
        self.left = 0.0
        """What was still expected when the solve was given up, in rounds like the last one."""
        self.outside = 0.0
        """Seconds spent in callbacks, which are not the solver's."""
        self.spent, self.rows, self.rounds = 0.0, 0, 0
        """Seconds, model evaluations and number of the rounds so far."""
        self._report: Reporter | None = None
        self._since, self._last, self._before = 0.0, float("inf"), 0

    def start(self, report: Reporter) -> SlowSolveMonitor:
        """Begin, with the reporter that is to be called as well."""
        self._report, self._since, self._before = report, self.clock(), report.work.system.model_evals
        return self

    def __call__(self, round: int, where: Any, residual: Tensor) -> object:
        assert self._report is not None
        now = self.clock()
        taken = now - self._since
        self.rounds, self.spent = round, self.spent + taken
        self.rows = self._report.work.system.model_evals - self._before
        seconds, self._last = min(taken, self._last), taken  # of the last two: a machine hiccups
        if self._report(round, where, residual) is True:
            return True
        self._since = self.clock()
        self.outside += self._since - now
        front, steps = min(where.lo), where.num_steps
        if round < FIRST_LOOK or front >= steps:
            return None
        chosen = self.plan.chosen
        self.left = work_left(round, chosen.effort, front - self.front, steps, chosen.window)
        self.gave_up = give_up(self.left, seconds, steps - front, self.step)
        return self.gave_up or None
