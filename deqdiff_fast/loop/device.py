"""The loop where the device decides: the host queues a round before it knows how the last one went.

Which rows are final, where the window goes and what the model is called on next stay on the device
(`kernels.advance_window`). The host reads each verdict one round late, from pinned memory: all it needs to know is an
upper bound of the number of active rows, which never grows, and whether to stop.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._types import Rows
from ..kernels import advance_window
from .base import Chain
from .stopping import StallDetector, forget, judge
from .task import Evaluate, Play, Progress, Task, restart_sample
from .window import Window


@dataclass(frozen=True)
class Lookahead:
    """How far the host runs ahead: one round, but none when the end is near.

    near: a round whose largest residual is below `near` times the one to finish at may be the last, or the one before.
    A model call too many costs more than a wait then, so the host waits for the round just queued. 0: it never does.
    """

    near: float = 30.0


class AsyncReadback:
    """Verdicts on their way to the host, in order; at most two at a time."""

    def __init__(self, like: Tensor) -> None:
        pinned = like.device.type == "cuda"
        self._slots = [torch.empty(like.shape, dtype=like.dtype, pin_memory=pinned) for _ in range(2)]
        event: Callable[[], Any] = torch.cuda.Event
        self._events = [event() for _ in self._slots] if pinned else None
        self._posted = self._read = 0

    @property
    def waiting(self) -> int:
        return self._posted - self._read

    def post(self, verdict: Tensor) -> None:
        """Queue a copy; the host goes on."""
        at = self._posted % 2
        self._slots[at].copy_(verdict, non_blocking=True)
        if self._events is not None:
            self._events[at].record(torch.cuda.current_stream(verdict.device))
        self._posted += 1

    def read(self) -> list[list[float]]:
        """The oldest verdict that was not read. The one place where the host waits for a round."""
        at = self._read % 2
        if self._events is not None:
            self._events[at].synchronize()  # late read
        self._read += 1
        verdict: list[list[float]] = self._slots[at].tolist()  # late read
        return verdict


class DeviceState(NamedTuple):
    """What the loop keeps on the device; always in the same place where its work is to be replayed."""

    was: Tensor  # (2, B), see `advance_window`
    verdict: Tensor  # (4, B)
    rows: Tensor  # (N,)
    previous: Tensor  # (T, B), see `contraction.judge`
    strict: Tensor  # (B,)

    @classmethod
    def make(cls, chain: Chain, capacity: int) -> DeviceState:
        """For a model call of at most `capacity` rows."""
        device, batch = chain.lo.device, chain.batch
        return cls(
            torch.zeros(2, batch, dtype=torch.int32, device=device),
            torch.zeros(4, batch, dtype=chain.sq_diff.dtype, device=device),
            torch.zeros(capacity, dtype=torch.int64, device=device),
            torch.empty_like(chain.sq_diff),
            torch.ones_like(chain.sq_diff[0]),
        )

    def start(self, chain: Chain, window: Window, before: Tensor | None) -> None:
        """The bounds and rows of the first window, which is the same for all samples; before: see `iterate`."""
        self.verdict.zero_()
        if before is not None:
            self.verdict[3].copy_(before)
        lo, hi = window.lo[0], window.hi[0]
        chain.lo.fill_(lo), chain.hi.fill_(hi)
        forget(self.previous)
        self.strict.fill_(1)
        torch.arange(lo * chain.batch, lo * chain.batch + len(self.rows), out=self.rows)
        self.rows.masked_fill_(self.rows >= hi * chain.batch, chain.num_steps * chain.batch)


class DeviceCalls:
    """`evaluate` for rows that the host knows, as the same device work as the calls of the loop."""

    def __init__(
        self, board: DeviceState, chain: Chain, evaluate: Evaluate, pad: Callable[[int], int], play: Play
    ) -> None:
        self.board, self.chain, self.evaluate, self.pad, self.play = board, chain, evaluate, pad, play
        self.padding = 0
        """Rows that the model was called on without need."""

    def __call__(self, rows: Rows, round: int) -> None:
        assert rows.flat is not None
        steps, found = self.chain.num_steps, self.board.rows
        count = min(self.pad(rows.count), len(found))
        self.padding += count - rows.count
        found[: rows.count].copy_(rows.flat, non_blocking=True)
        found[rows.count : count].fill_(steps * self.chain.batch)
        self.play(("model", count), lambda: self.evaluate(Rows(found[:count], 0, steps, count), round))


class _Loop:
    def __init__(self, task: Task, policy: Lookahead) -> None:
        chain = task.chain
        self.task, self.policy, self.chain = task, policy, chain
        self.window = Window(chain.num_steps, chain.batch, chain.window, task.start)
        self.progress = Progress(self.window, task.made)
        self.finish, self.reach, self.left = task.ends()
        self.sliding = chain.window < chain.num_steps
        self.board = task.board or DeviceState.make(chain, task.pad(self.window.count))
        self.board.start(chain, self.window, task.before)
        self.active = self.window.count  # when the round that was read last began
        self.mail = AsyncReadback(self.board.verdict)
        self.period = int(getattr(task.solver, "period", 0))
        self.by_step = bool(getattr(task.solver, "by_step", False))
        self.vigil, self.hanging = StallDetector(chain.batch, task.solver, task.finish), set[int]()
        self.queued: list[int] = []  # rows in the model call of every round

    def queue(self) -> None:
        """Hand a round to the device. Nothing here may wait for it."""
        task, self.progress.rounds = self.task, self.progress.rounds + 1
        round, count = self.progress.rounds, min(task.pad(self.window.count), len(self.board.rows))
        self.queued.append(count)
        rows = Rows(self.board.rows[:count], 0, self.chain.num_steps, count)
        task.play(("model", count), lambda: task.evaluate(rows, round))
        if self.period:
            task.play(("step", round % self.period), lambda: self.step(round))
        else:
            self.step(round)
        self.mail.post(self.board.verdict)

    def step(self, round: int) -> None:
        """The solver's step and its consequences, for predictions that are there."""
        task, chain, board = self.task, self.chain, self.board
        task.solver.step(chain, task.memory, round)
        if self.by_step:
            forget(board.previous)
        judge(
            chain.sq_diff, chain.sq_norm, board.previous, task.freeze, task.floor, board.strict, chain.backend
        )  # fmt: skip
        advance_window(
            chain.sq_diff, chain.sq_norm, chain.lo, chain.hi, board.was, board.verdict, board.rows, task.freeze,
            self.finish, chain.window, self.reach, self.left, backend=chain.backend,
        )  # fmt: skip
        task.solver.settle(chain, task.memory, round, self.board.was[0], chain.lo)
        if self.sliding:
            task.solver.enter(chain, task.memory, self.board.was[1], chain.hi)
            task.rebuild(self.board.was[1], chain.hi, False)

    def note(self) -> None:
        """Read a verdict; where an iterate has overflowed, wait for the round that is under way and repair it."""
        broken = self._take()
        if any(step < self.chain.num_steps for step in broken):
            latest = broken
            while self.mail.waiting:
                latest = self._take()
                broken = [min(a, b) for a, b in zip(broken, latest)]
            self._repair(broken, latest)
        if self.hanging:
            while self.mail.waiting:
                self._take()
            self._take_up()

    def _take_up(self) -> None:
        """Nothing is queued. The samples that hang start again from their first row, held tighter."""
        window, chain, listed = self.window, self.chain, self.board.rows
        for b in self.hanging:
            self.board.strict[b : b + 1].fill_(self.vigil.strict)
            self.board.verdict[3, b : b + 1].fill_(0)
            restart_sample(self.task, window, b)
        self.hanging.clear()
        self.active = window.count
        if window.done:
            return
        chain.lo.copy_(torch.tensor(window.lo, dtype=torch.int32))
        chain.hi.copy_(torch.tensor(window.hi, dtype=torch.int32))
        rows = window.rows()
        flat = torch.arange(rows.lo * chain.batch, rows.hi * chain.batch) if rows.flat is None else rows.flat
        listed.fill_(chain.num_steps * chain.batch)
        listed[: rows.count].copy_(flat)

    def _take(self) -> list[int]:
        """Read one verdict into what the host knows; returns the first broken row of each sample."""
        lo, hi, broken, worst = self.mail.read()
        self.window.lo, self.window.hi = [int(a) for a in lo], [int(b) for b in hi]
        progress = self.progress
        progress.padding += self.queued[len(progress.trace)] - self.active
        self.active = self.window.count
        progress.trace.append(torch.tensor(worst, dtype=self.board.verdict.dtype))
        self.hanging.update(self.vigil.look(worst))
        round = self.task.made + len(progress.trace)
        progress.stopped |= self.task.report(round, self.window, progress.trace[-1]) is True
        return [int(step) for step in broken]

    def _repair(self, broken: list[int], latest: list[int]) -> None:
        """Nothing is queued: the device stands still after the latest round."""
        task, chain = self.task, self.chain
        now, before = chain.lo.clone(), self.board.was[0].clone()
        chain.lo.copy_(before)  # what the latest round was made with
        for b, step in enumerate(latest):
            error = task.diagnose(step, b, self.progress.rounds) if step < chain.num_steps else None
            if error is not None:
                raise error
        chain.lo.copy_(now)
        hi = list(self.window.hi)
        starts = [max(lo, step) if step < chain.num_steps else end for lo, step, end in zip(self.window.lo, broken, hi)]
        task.solver.enter(chain, task.memory, starts, hi)
        task.rebuild(starts, hi, True)
        self.progress.repairs += 1

    def _near(self) -> bool:
        """Whether the round just queued may be the last."""
        last = max(self.progress.trace[-1].tolist()) if self.progress.trace else float("inf")
        return last <= self.policy.near * self.task.finish

    def run(self) -> Progress:
        progress, task = self.progress, self.task
        while not self.window.done and progress.rounds < task.max_rounds and not progress.stopped:
            self.queue()
            while self.mail.waiting > (0 if self._near() else 1):
                self.note()
        while self.mail.waiting:
            self.note()
        return progress


def iterate_on_device(task: Task, policy: Lookahead) -> Progress:
    """`iterate` with the decisions on the device: the same rows final after every round, at most one round more."""
    return _Loop(task, policy).run()
