"""Times the rounds of a running solve, and gives it up where the serial chain would be there sooner."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..engine.progress import Reporter
from ..engine.system import System
from ..plan import Plan, RoundEstimate
from ..schedule.cache import seconds_of_tables
from .decide import rows_of_rounds
from .shared_clock import SharedClock

PATIENT_ROUNDS = 2  # before which nothing is given up: the first call of a size is slow
ABORT_RATIO = 1.15  # a solve is given up where it is predicted to take this many times what the serial rest would


class SlowSolveMonitor:
    """Called in the reporter's place after every round, on nodes or not.

    Args:
        plan: what is being done.
        step: seconds of a serial step.
        front: steps that were made before the first round, and are taken over.
        clock: seconds.
        nodes: whether the solve begins with rounds on nodes.
        full_rounds: seconds of the rounds on all timesteps that follow those on nodes where these do not suffice; None
            where that is not known.

    Attributes:
        gave_up: whether it was the monitor that stopped the solve.
        left: what was still expected then, in rounds like the last one.
        outside: seconds spent in callbacks, which are not the solver's.
        spent, rows, rounds: seconds, model evaluations and number of the rounds so far.
    """

    def __init__(
        self, plan: Plan, step: float, front: int, clock: Callable[[], float], nodes: bool = False,
        full_rounds: float | None = None,
    ) -> None:  # fmt: skip
        self.plan, self.step, self.front, self.clock = plan, step, front, clock
        self.nodes, self.full_rounds, self.gave_up = nodes, full_rounds, False
        self.left, self.outside, self.spent = 0.0, 0.0, 0.0
        self.rows, self.rounds = 0, 0
        self._report: Reporter | None = None
        self._system: System | None = None
        self._since, self._last, self._before, self._rows, self._tables = clock(), float("inf"), 0, 0, 0.0

    def start(self, system: System, report: Reporter | None) -> SlowSolveMonitor:
        """Begin, or go on, with rounds of that system, and the reporter, if any, that is to be called as well."""
        if system is not self._system:
            self._system, self._before, self._rows = system, system.model_evals, self.rows
            self._tables = self._seconds_of_tables()
        self._report = report
        return self

    def _seconds_of_tables(self) -> float:
        """What the running solve has spent on tables; none by a clock that does not count it."""
        alone = self._system is not None and not isinstance(self.clock, SharedClock)
        return seconds_of_tables(self._system.schedule) if alone and self._system is not None else 0.0

    def leaves_nodes(self) -> bool:
        """Whether rounds on all timesteps, which would have to follow, take longer than the serial chain."""
        steps, serial = self.plan.steps, self.plan.steps * self.step
        if self.full_rounds is not None and not self.gave_up and self.rounds:
            self.gave_up = self.full_rounds > ABORT_RATIO * serial
            self.left = min(self.full_rounds * self.rounds / max(self.spent, 1e-12), float(steps))
        return self.gave_up

    def __call__(self, round: int, where: Any, residual: Tensor) -> object:
        assert self._system is not None
        now = getattr(self.clock, "last", self.clock)()  # ranks that share a clock have exchanged it with the rows
        taken = now - self._since
        self.rounds, self.spent = round, self.spent + taken
        self.rows = self._rows + self._system.model_evals - self._before
        before, self._tables = self._tables, self._seconds_of_tables()
        taken = max(taken - (self._tables - before), 0.0)  # later rounds, and solves, find the tables made
        round_seconds, self._last = min(taken, self._last), taken  # of the last two: a machine hiccups
        self._since = now
        if self._report is not None:
            if self._report(round, where, residual) is True:
                return True
            self._since = self.clock()
        self.outside += self._since - now
        front, steps = min(where.lo), where.num_steps
        if round < PATIENT_ROUNDS or front >= steps:
            return None
        chosen = self.plan.chosen
        self.left = work_left(round, chosen.effort, front - self.front, steps, chosen.window, self.nodes)
        self.gave_up = give_up(self.left, round_seconds, steps - front, self.step)
        return self.gave_up or None


def work_left(done: int, effort: RoundEstimate, front: int, steps: int, window: int, nodes: bool = False) -> float:
    """What a running solve may still need, in units of its last round.

    One that is overdue is expected to go on as long as it is overdue. front: how many timesteps are final.
    """
    planned = rows_of_rounds(effort, window, steps, 1)
    if nodes:
        left = max(effort.rounds - done, 1.0 + (done - effort.rounds))  # the next ones are much like the last one
    elif len(planned) > done:
        left = sum(count * rows for count, rows in planned[done:]) / max(planned[done - 1][1], 1e-9)
    else:
        left = effort.rounds - done if done < effort.rounds else 1.0 + (done - effort.rounds)
    if window < steps and done >= 3 and (front >= window or done > effort.rounds / 2):
        # a window moves at a steady pace, once it does
        left = max(left, (steps - front) * done / front if front else float(steps))
    return min(max(left, 0.5), float(steps - front))


def give_up(left: float, round_seconds: float, serial_left: int, step: float) -> bool:
    """Whether finishing serially is clearly faster than `left` more rounds that take as long as the last one."""
    return left * round_seconds > ABORT_RATIO * serial_left * step
