"""The loop where the device decides: the host queues a round before it knows how the last one went.

Which rows are final, where the window goes and what the model is called on next stay on the device
(`kernels.advance_window`). The host reads each decision one round late, from pinned memory: all it needs to know is an
upper bound of the number of active rows, which never grows, and whether to stop.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._types import Rows
from .device_state import AsyncReadback, DeviceState
from .stopping import StallDetector
from .task import Lookahead, Progress, Task


class DeviceLoop:
    """One solve; see `iterate_on_device`."""

    def __init__(self, task: Task) -> None:
        chain = task.chain
        self.task, self.chain, self.rule = task, chain, task.rule
        self.window = task.first_window()
        self.progress = Progress(self.window, task.rounds_before)
        self.sliding = chain.window < chain.num_steps
        self.state = task.device.state or DeviceState.make(chain, task.device.pad(self.window.count))
        self.state.start(chain, self.window)
        self.doubted = None if task.doubted is None else torch.tensor(task.doubted, device=chain.states.device)
        self.active = self.window.count  # when the round that was read last began
        self.readback = AsyncReadback(self.state.decision)
        self.period = task.solver.period
        self.stalls, self.stalled = StallDetector(chain.batch, task.solver, self.rule.finish), set[int]()
        self.queued: list[int] = []  # rows in the model call of every round

    def run(self) -> Progress:
        """Queue rounds until the end is known."""
        progress, task = self.progress, self.task
        while not self.window.done and progress.rounds < task.max_rounds and not progress.stopped:
            self.queue()
            while self.readback.waiting > (0 if self._near() else 1):
                self.consume()
        while self.readback.waiting:
            self.consume()
        return progress

    def queue(self) -> None:
        """Hand a round to the device. Nothing here may wait for it."""
        task, self.progress.rounds = self.task, self.progress.rounds + 1
        round, count = self.progress.rounds, min(task.device.pad(self.window.count), len(self.state.rows))
        self.queued.append(count)
        rows = Rows(self.state.rows[:count], 0, self.chain.num_steps, count)
        task.device.replay(("model", count), lambda: task.evaluate(rows, round))
        if self.doubted is not None and round == task.rounds_before + 1:
            self.step(round, self.doubted)
        elif self.period:
            task.device.replay(("step", round % self.period), lambda: self.step(round))
        else:
            self.step(round)
        self.readback.enqueue(self.state.decision)

    def step(self, round: int, doubted: Tensor | None = None) -> None:
        """The solver's step and its consequences, for predictions that are there; doubted: see `StoppingRule.hold`."""
        task, chain, state = self.task, self.chain, self.state
        task.solver.step(chain, task.memory, round)
        self.rule.mark_converged(chain, state.previous, state.strict)
        if doubted is not None:
            self.rule.hold(chain, doubted)
        self.rule.advance_on_device(chain, state)
        task.solver.settle(chain, task.memory, round, state.previous_bounds[0], chain.lo)
        if self.sliding:
            task.solver.enter(chain, task.memory, state.previous_bounds[1], chain.hi)
            task.rebuild(state.previous_bounds[1], chain.hi, False)

    def consume(self) -> None:
        """Read a decision; where an iterate has overflowed, wait for the round that is under way and repair it."""
        broken = self._read()
        if any(step < self.chain.num_steps for step in broken):
            latest = broken
            while self.readback.waiting:
                latest = self._read()
                broken = [min(a, b) for a, b in zip(broken, latest)]
            self._repair(broken, latest)
        if self.stalled:
            while self.readback.waiting:
                self._read()
            self._restart_stalled()

    def _read(self) -> list[int]:
        """Read one decision into what the host knows; returns the first broken row of each sample."""
        lo, hi, broken, worst = self.readback.read()
        self.window.lo, self.window.hi = [int(a) for a in lo], [int(b) for b in hi]
        progress = self.progress
        progress.padding += self.queued[len(progress.trace)] - self.active
        self.active = self.window.count
        progress.trace.append(torch.tensor(worst, dtype=self.state.decision.dtype))
        self.stalled.update(self.stalls.update(worst))
        round = self.task.rounds_before + len(progress.trace)
        progress.stopped |= self.task.report(round, self.window, progress.trace[-1]) is True
        return [int(step) for step in broken]

    def _restart_stalled(self) -> None:
        """Nothing is queued. The samples that have stalled start again from their first row, held tighter."""
        for b in self.stalled:
            self.state.strict[b : b + 1].fill_(self.stalls.strict)
            self.task.restart_sample(self.window, b)
        self.stalled.clear()
        self.active = self.window.count
        if not self.window.done:
            self.state.take(self.chain, self.window)

    def _repair(self, broken: list[int], latest: list[int]) -> None:
        """Nothing is queued: the device stands still after the latest round."""
        task, chain = self.task, self.chain
        now, before = chain.lo.clone(), self.state.previous_bounds[0].clone()
        chain.lo.copy_(before)  # what the latest round was made with
        for b, step in enumerate(latest):
            if step < chain.num_steps:
                task.blame(step, b, self.progress.rounds)
        chain.lo.copy_(now)
        hi = list(self.window.hi)
        starts = [max(lo, step) if step < chain.num_steps else end for lo, step, end in zip(self.window.lo, broken, hi)]
        task.solver.enter(chain, task.memory, starts, hi)
        task.rebuild(starts, hi, True)
        self.progress.repairs += 1

    def _near(self) -> bool:
        """Whether the round just queued may be the last."""
        last = max(self.progress.trace[-1].tolist()) if self.progress.trace else float("inf")
        lookahead = self.task.device.lookahead or Lookahead()
        return last <= lookahead.near * self.rule.finish


def iterate_on_device(task: Task) -> Progress:
    """`iterate` with the decisions on the device: the same rows final after every round, at most one round more."""
    return DeviceLoop(task).run()
