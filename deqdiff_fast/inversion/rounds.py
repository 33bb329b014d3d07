"""The loop of the equilibrium inversion: windows and frozen rows from the image end, and a finish row by row."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..kernels import inverse_scan, newton_scan
from ..solver import Window
from ..spectral import SpectralSlope
from ..system import SANE_RMS, System
from . import guess
from .base import InversionInfo, InversionStats, Task, check_finite, read_out

if TYPE_CHECKING:
    from .equilibrium import Equilibrium

FINISH = 0.5  # of the tolerance: the error predicted by the linear model of the chain at which a solve ends early
PASSES, STRICTER = 3, 0.3  # where all rows are final and the tolerance is not met: once more, with rows held tighter
TAIL_FREEZE, FREEZE = 0.3, 0.03  # of the tolerance: the miss with which a row next to the known state is final
STIFF = 0.5  # a step that contracts directions without data more than that is solved before the ones before it
FLAT_VARIANCE = 1e-3  # of such directions
ROW_ROUNDS = 20  # on average, for each row that is finished on its own
FLOOR = {torch.float64: 1e-14, torch.float32: 5e-7}  # what rounding alone leaves of a residual
INF = float("inf")


class Rounds:
    """One solve. Rows lo[b] <= i < hi[b] are active; states hi[b] .. T are final for sample b."""

    def __init__(
        self, method: Equilibrium, task: Task, system: System, spectrum: SpectralSlope | None, stats: InversionStats
    ) -> None:
        self.method, self.task, self.system, self.stats = method, task, system, stats
        self.steps, self.batch = system.num_steps, system.batch
        self.one_step = task.schedule.lags == 1
        self.tail = stiff_rows(task) if self.one_step else self.steps
        width = self.steps if task.window == "auto" or not self.one_step else min(int(task.window), self.steps)
        self.width, self.auto = width, task.window == "auto" and self.one_step
        self.work = task.open(system, method, width)
        self.chain, self.rings = self.work.chain, self.work.memory
        guess.fill(self.work, spectrum, task.init)
        self.scale = guess.flow_scale(task.schedule, spectrum).to(system.device, system.dtype)
        self.weight = self.scale[-1] / self.scale[1:]  # what a miss of row i becomes on its way to the image
        self.size = self.chain.states[-1].square().sum(1).clamp_min(1e-30)
        self.limit = task.max_rounds or max(60, self.steps)
        self.window = Window(self.steps, self.batch, width)
        self.stats.window = width
        self.bound = max(task.tol, FLOOR[system.dtype])
        self.expected, self.done = [INF] * self.batch, [False] * self.batch
        self.warm, self.stopped = task.init is not None, False

    def run(self) -> Tensor:
        """(B,) bool: which samples are believed to hold."""
        self._begin(list(range(self.batch)), self.width)
        self._loop(self.limit)
        failed = [b for b in range(self.batch) if not self.done[b]]
        if failed and not self.stopped and self.task.on_failure == "serial" and self.one_step:
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
        self.rings.filled.zero_()
        for b in range(self.batch):
            live = b in samples
            self.window.hi[b] = self.steps if live else 0
            self.window.lo[b] = max(0, self.steps - self._reach(self.steps)) if live else 0

    def _reach(self, hi: int) -> int:
        """How many rows below hi are solved together: the stiff ones first, then all."""
        if self.auto and self.current > 1:
            return self.tail if hi > self.steps - self.tail else hi
        return self.current

    def _loop(self, limit: int) -> None:
        trace = []
        while any(self.window.hi) and self.stats.rounds < limit and not self.stopped:
            self.stats.rounds += 1
            residual = self._round()
            self._advance()
            trace.append(residual)
            self.stopped = self._report(residual)
        if trace:
            before = self.stats.residual_trace
            rows = torch.stack(trace)
            self.stats.residual_trace = torch.cat([before, rows]) if len(before) else rows

    def _round(self) -> Tensor:
        """Evaluate and solve the active rows. Returns (B,) the largest relative residual among them, on the CPU."""
        chain, rings, round = self.chain, self.rings, self.stats.rounds
        lo, hi = self.window.lo, self.window.hi
        chain.lo.copy_(torch.tensor(lo, dtype=torch.int32))
        chain.hi.copy_(torch.tensor(hi, dtype=torch.int32))
        self.work.evaluate(self.window.rows(), round)
        self._expect()
        method = self.method
        self.column = round % (method.history + 1)
        inverse_scan(
            chain.states, chain.predictions, chain.state_coef, chain.model_coef, chain.slope, self.weight, chain.lo,
            chain.hi, chain.sq_diff, rings.z, rings.e, rings.filled, self.column, method.damping, method.ridge,
            method.stale, method.floor, method.reach, chain.drift,
            backend="auto" if chain.backend == "triton" else chain.backend,
        )  # fmt: skip
        self.residual = (chain.sq_diff / self.size).sqrt()
        self._repair()
        table = self.residual.cpu()
        return torch.stack(
            [table[a:b, k].max() if a < b else table.new_zeros(()) for k, (a, b) in enumerate(zip(lo, hi))]
        )

    def _expect(self) -> None:
        """The error that the serial chain would make from the running noise, by the linear model around the states."""
        live = [b for b in range(self.batch) if self.window.hi[b] > 0 and self.window.lo[b] == 0]
        if not live:
            return
        chain, rings = self.chain, self.rings
        rings.forward.copy_(chain.states)
        rings.known.zero_()
        every = torch.full_like(chain.lo, self.steps)
        scratch = torch.empty_like(chain.sq_diff)
        newton_scan(
            rings.forward, chain.predictions, chain.state_coef, chain.model_coef, chain.slope,
            torch.zeros_like(every), every, scratch, torch.empty_like(scratch), rings.known_z, rings.known_e,
            rings.known, 0, drift=chain.drift, backend=chain.backend,
        )  # fmt: skip
        apart = (rings.forward[-1] - chain.states[-1]).norm(dim=1) / chain.states[-1].norm(dim=1)
        for b, value in enumerate(apart.tolist()):
            if b in live:
                self.expected[b] = value if value == value else INF

    def _repair(self) -> None:
        """Rows whose prediction overflowed start again from the row after them."""
        chain, rings = self.chain, self.rings
        broken = ~self.residual.isfinite()
        for i in reversed(broken.any(1).nonzero().flatten().tolist()):
            check_finite(self.work, rings.z[self.column, i % self.width], i, self.residual[i], self.stats.rounds)
            who = broken[i]
            fresh = chain.states[i + 1] * (self.scale[i] / self.scale[i + 1])
            sane = fresh.square().mean(1, keepdim=True).sqrt() / SANE_RMS
            chain.states[i, who] = (fresh / sane.clamp_min(1))[who]
            rings.filled[i % self.width, who] = 0
            self.stats.repairs += 1

    def _advance(self) -> None:
        """Freeze rows from the image end, keep what was evaluated where a sample is done, let new rows in."""
        table = self.residual.cpu()
        for b in range(self.batch):
            lo, hi = self.window.lo[b], self.window.hi[b]
            if hi == 0:
                continue
            front = hi
            if lo == 0 and self.expected[b] <= FINISH * self.bound:
                front = 0
            elif self.one_step:
                while front > lo and table[front - 1, b] <= self._freeze(b, front - 1):
                    front -= 1
                if front == hi and self._stuck(b, float(table[hi - 1, b])):
                    front -= 1
            elif self._stuck(b, self.expected[b]):
                front = 0
            if front < hi:
                self._keep(b, front, hi)
                self.best[b], self.since[b] = INF, self.stats.rounds
                self._move(b, lo, front)

    def _move(self, b: int, lo: int, front: int) -> None:
        """States front..T of sample b are final."""
        self.window.hi[b], self.window.lo[b] = front, max(0, front - self._reach(front))
        if front > 0:
            self._enter(b, self.window.lo[b], min(lo, front))
            return
        self.done[b] = self.expected[b] <= self.bound
        if not self.done[b] and self.one_step and self.current > 1 and self.passes[b] < PASSES:
            self.passes[b] += 1
            self.window.hi[b], self.window.lo[b] = self.steps, self.steps - self.current

    def _freeze(self, b: int, i: int) -> float:
        """The miss at which row i is final."""
        part = TAIL_FREEZE if i >= self.steps - self.tail else FREEZE
        return part * self.bound * STRICTER ** (self.passes[b] - 1)

    def _stuck(self, b: int, value: float) -> bool:
        self._watch(b, value)
        return self.stats.rounds - self.since[b] >= self.method.patience

    def _watch(self, b: int, value: float) -> None:
        """Remember when `value` last became clearly smaller."""
        if value < 0.9 * self.best[b]:
            self.best[b], self.since[b] = value, self.stats.rounds

    def _keep(self, b: int, start: int, stop: int) -> None:
        """States start..stop-1 of sample b become those that were evaluated last."""
        for i in range(start, stop):
            self.chain.states[i, b] = self.rings.z[self.column, i % self.width, b]

    def _enter(self, b: int, start: int, stop: int) -> None:
        """Rows start..stop-1 enter: unless a trajectory was given, their states follow the row after them."""
        for i in range(start, stop):
            self.rings.filled[i % self.width, b] = 0
            if not self.warm:
                self.chain.states[i, b] = self.chain.states[stop, b] * (self.scale[i] / self.scale[stop])

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
            _sample=lambda: read_out(self.work)[0],
        )
        return self.task.report(info) is True


def stiff_rows(task: Task) -> int:
    """Rows counted from the image end up to the last one that contracts directions without data by more than STIFF."""
    schedule = task.schedule
    factor = schedule.state_coef[:, 0] + schedule.model_coef[:, 0] * schedule.slope(FLAT_VARIANCE)
    stiff = (factor.abs() < STIFF).nonzero().flatten().tolist()
    return schedule.num_steps - stiff[0] if stiff else 0
