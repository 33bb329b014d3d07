"""The loop of the equilibrium inversion: windows and frozen rows from the image end, and a finish row by row."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..engine.options import FLOOR
from ..engine.system import System
from ..kernels.stopping import MAX_RATE
from ..loop.window import Window
from ..schedule import SpectralSlope
from .base import InversionProblem, InversionStats, noise_and_trajectory
from .equilibrium_step import EquilibriumStep, stiff_rows

if TYPE_CHECKING:
    from .equilibrium import Equilibrium

FINISH = 0.33  # of the tolerance: the error predicted by the linear model of the chain at which a solve ends early
PASSES, STRICTER = 3, 0.3  # where all rows are final and the tolerance is not met: once more, with rows held tighter
TAIL_FREEZE, FREEZE = 0.3, 0.03  # of the tolerance: the miss with which a row next to the known state is final
TAIL_PATIENCE = 4  # times the patience with other rows: long histories pause before they converge
TAIL_ROUNDS = 150  # more than any tail has taken, on top of one round a step
ROW_ROUNDS = 20  # on average, for each row that is finished on its own
INF = float("inf")


class EquilibriumLoop:
    """One solve. Rows lo[b] <= i < hi[b] are active; states hi[b] .. T are final for sample b."""

    def __init__(
        self, method: Equilibrium, problem: InversionProblem, system: System, spectrum: SpectralSlope | None,
        stats: InversionStats,
    ) -> None:  # fmt: skip
        self.method, self.problem, self.stats = method, problem, stats
        self.steps, self.batch = system.num_steps, system.batch
        self.tail = stiff_rows(problem.schedule)
        self.width = self.steps if problem.window == "auto" else min(int(problem.window), self.steps)
        self.step = EquilibriumStep(method, problem, system, spectrum, self.width, self.tail)
        self.work = self.step.work
        self.limit = problem.max_rounds or self.steps + TAIL_ROUNDS
        self.window = Window(self.steps, self.batch, self.width)
        self.stats.window = self.width
        self.bound = max(problem.tol, FLOOR[system.dtype])
        self.expected, self.done = [INF] * self.batch, [False] * self.batch
        self.warm, self.stopped = problem.init_trajectory is not None, False

    def run(self) -> Tensor:
        """(B,) bool: which samples are believed to be within the tolerance."""
        self._begin(list(range(self.batch)), self.width)
        self._iterate(self.limit)
        failed = [b for b in range(self.batch) if not self.done[b]]
        if failed and not self.stopped and self.problem.on_failure == "serial":
            self.stats.finished_serially = self.steps
            self.stats.notes.append(f"{len(failed)} of {self.batch} samples finished row by row")
            self.warm = True
            self._begin(failed, 1)
            self._iterate(self.stats.rounds + ROW_ROUNDS * self.steps)
        converged = torch.tensor(self.done)
        self.stats.stop_reason = "callback" if self.stopped else "converged" if bool(converged.all()) else "max_rounds"
        return converged

    def _begin(self, samples: list[int], width: int) -> None:
        """Start at the image end; samples that are not listed stay as they are."""
        self.current_width, self.passes = width, [1] * self.batch
        self.best, self.since = [INF] * self.batch, [self.stats.rounds] * self.batch
        self.step.clear_history()
        for b in range(self.batch):
            self.window.hi[b] = self.steps if b in samples else 0
            self.window.lo[b] = self._window_start(self.steps) if b in samples else 0

    def _window_start(self, hi: int) -> int:
        """The first row that is solved together with the ones below hi: the stiff ones first, then the window."""
        first = self.steps - self.tail if hi > self.steps - self.tail else 0
        return max(first, hi - self.current_width)

    def _iterate(self, limit: int) -> None:
        """Rounds until all samples are final, the limit is reached or the user stops."""
        trace = []
        while any(self.window.hi) and self.stats.rounds < limit and not self.stopped:
            self.stats.rounds += 1
            lo, hi = list(self.window.lo), list(self.window.hi)
            missed, expected, repairs = self.step.run(self.window.rows(), lo, hi, self.stats.rounds)
            self.stats.repairs += repairs
            worst = [missed[a:b, k].max() if a < b else missed.new_zeros(()) for k, (a, b) in enumerate(zip(lo, hi))]
            trace.append(torch.stack(worst))
            self._freeze_rows(missed, expected.tolist())
            self.stopped = self.problem.notify(
                self.stats.rounds, self.limit, self.steps - torch.tensor(self.window.hi), trace[-1],
                FREEZE * self.bound, lambda: noise_and_trajectory(self.work)[0],
            )  # fmt: skip
        if trace:
            before = self.stats.residual_trace
            self.stats.residual_trace = torch.cat([before, torch.stack(trace)]) if len(before) else torch.stack(trace)

    def _freeze_rows(self, missed: Tensor, expected: list[float]) -> None:
        """Freeze rows from the image end at the states that were evaluated, and let new rows in."""
        for b in range(self.batch):
            lo, hi = self.window.lo[b], self.window.hi[b]
            if hi == 0:
                continue
            if lo == 0:
                self.expected[b] = expected[b]
            new_hi = hi
            if lo == 0 and self.expected[b] <= FINISH * self.bound:
                new_hi = 0
            else:
                while new_hi > lo and missed[new_hi - 1, b] <= self._row_tolerance(b, new_hi - 1):
                    new_hi -= 1
            if new_hi == hi and self._stalled(b, float(missed[hi - 1, b])):
                new_hi = hi - 1
            if new_hi < hi:
                self.step.restore_evaluated(b, new_hi, hi)
                self.best[b], self.since[b] = INF, self.stats.rounds
                self._move_window(b, lo, new_hi)

    def _move_window(self, b: int, lo: int, new_hi: int) -> None:
        """States new_hi..T of sample b are final; lo: the first active row so far."""
        self.window.hi[b], self.window.lo[b] = new_hi, self._window_start(new_hi)
        if new_hi > 0:
            self.step.enter(b, self.window.lo[b], min(lo, new_hi), self.warm)
            return
        self.done[b] = self.expected[b] <= self.bound
        if not self.done[b] and self.current_width > 1 and self.passes[b] < PASSES:
            self.passes[b] += 1
            self.window.hi[b], self.window.lo[b] = self.steps, self._window_start(self.steps)

    def _row_tolerance(self, b: int, i: int) -> float:
        """The miss at which row i is final."""
        part = TAIL_FREEZE if i >= self.steps - self.tail else FREEZE
        return part * self.bound * STRICTER ** (self.passes[b] - 1)

    def _stalled(self, b: int, value: float) -> bool:
        """Whether `value` has not become clearly smaller for too long."""
        if value < MAX_RATE * self.best[b]:
            self.best[b], self.since[b] = value, self.stats.rounds
        patience = self.method.patience * (TAIL_PATIENCE if self.window.hi[b] > self.steps - self.tail else 1)
        return self.stats.rounds - self.since[b] >= patience
