"""The loop of the equilibrium inversion: windows and frozen rows from the image end, and a finish row by row."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..engine.system import System
from ..loop.window import Window
from ..schedule import SpectralSlope
from .base import InversionInfo, InversionStats, Task, read_out
from .sweep import Sweep, stiff_rows

if TYPE_CHECKING:
    from .equilibrium import Equilibrium

FINISH = 0.33  # of the tolerance: the error predicted by the linear model of the chain at which a solve ends early
PASSES, STRICTER = 3, 0.3  # where all rows are final and the tolerance is not met: once more, with rows held tighter
TAIL_FREEZE, FREEZE = 0.3, 0.03  # of the tolerance: the miss with which a row next to the known state is final
TAIL_PATIENCE = 4  # times the patience with other rows: long histories pause before they converge
TAIL_ROUNDS = 150  # more than any tail has taken, on top of one round a step
ROW_ROUNDS = 20  # on average, for each row that is finished on its own
FLOOR = {torch.float64: 1e-14, torch.float32: 5e-7}  # what rounding alone leaves of a residual
INF = float("inf")


class Rounds:
    """One solve. Rows lo[b] <= i < hi[b] are active; states hi[b] .. T are final for sample b."""

    def __init__(
        self, method: Equilibrium, task: Task, system: System, spectrum: SpectralSlope | None, stats: InversionStats
    ) -> None:
        self.method, self.task, self.stats = method, task, stats
        self.steps, self.batch = system.num_steps, system.batch
        self.tail = stiff_rows(task)
        self.width = self.steps if task.window == "auto" else min(int(task.window), self.steps)
        self.sweep = Sweep(method, task, system, spectrum, self.width, self.tail)
        self.limit = task.max_rounds or self.steps + TAIL_ROUNDS
        self.window = Window(self.steps, self.batch, self.width)
        self.stats.window = self.width
        self.bound = max(task.tol, FLOOR[system.dtype])
        self.expected, self.done = [INF] * self.batch, [False] * self.batch
        self.warm, self.stopped = task.init is not None, False

    def run(self) -> Tensor:
        """(B,) bool: which samples are believed to hold."""
        self._begin(list(range(self.batch)), self.width)
        self._loop(self.limit)
        failed = [b for b in range(self.batch) if not self.done[b]]
        if failed and not self.stopped and self.task.on_failure == "serial":
            self.stats.finished_serially = self.steps
            self.stats.notes.append(f"{len(failed)} of {self.batch} samples finished row by row")
            self.warm = True
            self._begin(failed, 1)
            self._loop(self.stats.rounds + ROW_ROUNDS * self.steps)
        ok = torch.tensor(self.done)
        self.stats.stop_reason = "callback" if self.stopped else "converged" if bool(ok.all()) else "max_rounds"
        return ok

    def _begin(self, samples: list[int], width: int) -> None:
        """Start at the image end; samples that are not listed stay as they are."""
        self.current, self.passes = width, [1] * self.batch
        self.best, self.since = [INF] * self.batch, [self.stats.rounds] * self.batch
        self.sweep.forget()
        for b in range(self.batch):
            live = b in samples
            self.window.hi[b] = self.steps if live else 0
            self.window.lo[b] = self._low(self.steps) if live else 0

    def _low(self, hi: int) -> int:
        """The first row that is solved together with the ones below hi: the stiff ones first, then the window."""
        if self.current > 1 and hi > self.steps - self.tail:
            return self.steps - self.tail
        return max(0, hi - self.current)

    def _loop(self, limit: int) -> None:
        trace = []
        while any(self.window.hi) and self.stats.rounds < limit and not self.stopped:
            self.stats.rounds += 1
            lo, hi = list(self.window.lo), list(self.window.hi)
            missed, expected, repairs = self.sweep.run(self.window.rows(), lo, hi, self.stats.rounds)
            self.stats.repairs += repairs
            worst = [missed[a:b, k].max() if a < b else missed.new_zeros(()) for k, (a, b) in enumerate(zip(lo, hi))]
            trace.append(torch.stack(worst))
            self._advance(missed, expected.tolist())
            self.stopped = self._report(trace[-1])
        if trace:
            before = self.stats.residual_trace
            self.stats.residual_trace = torch.cat([before, torch.stack(trace)]) if len(before) else torch.stack(trace)

    def _advance(self, missed: Tensor, expected: list[float]) -> None:
        """Freeze rows from the image end, keep what was evaluated where a sample is done, let new rows in."""
        for b in range(self.batch):
            lo, hi = self.window.lo[b], self.window.hi[b]
            if hi == 0:
                continue
            if lo == 0:
                self.expected[b] = expected[b]
            front = hi
            if lo == 0 and self.expected[b] <= FINISH * self.bound:
                front = 0
            else:
                while front > lo and missed[front - 1, b] <= self._freeze(b, front - 1):
                    front -= 1
            if front == hi and self._stuck(b, float(missed[hi - 1, b])):
                front = hi - 1
            if front < hi:
                self.sweep.keep(b, front, hi)
                self.best[b], self.since[b] = INF, self.stats.rounds
                self._move(b, lo, front)

    def _move(self, b: int, lo: int, front: int) -> None:
        """States front..T of sample b are final."""
        self.window.hi[b], self.window.lo[b] = front, self._low(front)
        if front > 0:
            self.sweep.enter(b, self.window.lo[b], min(lo, front), self.warm)
            return
        self.done[b] = self.expected[b] <= self.bound
        if not self.done[b] and self.current > 1 and self.passes[b] < PASSES:
            self.passes[b] += 1
            self.window.hi[b], self.window.lo[b] = self.steps, self._low(self.steps)

    def _freeze(self, b: int, i: int) -> float:
        """The miss at which row i is final."""
        part = TAIL_FREEZE if i >= self.steps - self.tail else FREEZE
        return part * self.bound * STRICTER ** (self.passes[b] - 1)

    def _stuck(self, b: int, value: float) -> bool:
        """Whether `value` has not become clearly smaller for too long."""
        if value < 0.9 * self.best[b]:
            self.best[b], self.since[b] = value, self.stats.rounds
        patience = self.method.patience * (TAIL_PATIENCE if self.window.hi[b] > self.steps - self.tail else 1)
        return self.stats.rounds - self.since[b] >= patience

    def _report(self, residual: Tensor) -> bool:
        if self.task.report is None:
            return False
        info = InversionInfo(
            round=self.stats.rounds,
            max_rounds=self.limit,
            num_steps=self.steps,
            front=self.steps - torch.tensor(self.window.hi),
            residual=residual,
            tolerance=FREEZE * self.bound,
            _sample=lambda: read_out(self.sweep.work)[0],
        )
        return self.task.report(info) is True
