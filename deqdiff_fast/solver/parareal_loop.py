"""The rounds of a parareal solve: long steps one after the other, the steps inside all blocks side by side."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .._types import Rows
from ..kernels.stopping import TINY_OF
from ..loop.base import Chain
from ..loop.task import Progress, Task
from ..loop.window import Window


class PararealMemory(NamedTuple):
    fine: Tensor  # (N, B, D) F(U[j]): the end of block j by its own steps
    coarse: Tensor  # (N, B, D) G(U[j]): the same by one long step


def step_factors(chain: Chain) -> tuple[Tensor, Tensor]:
    """(T,), (T,) float64 k, c: the steps as x' = k x + c x0 + drift, x0 = p x + q E the predicted clean sample."""
    a, b = chain.state_coef[:, 0].cpu().double(), chain.model_coef[:, 0].cpu().double()
    p, q = chain.denoised_coef.cpu().double().unbind(1)
    used = b != 0
    clean_factor, state_factor = torch.where(used, b / q, 0), torch.where(used, a - b * p / q, a)
    bad = (~(clean_factor.isfinite() & state_factor.isfinite())).nonzero().flatten().tolist()
    if bad:
        raise ValueError("solver: 'parareal' holds the predicted clean sample over a block; expected predictions that "
                         f"determine it, got none at step {bad[0]} of {len(a)}")  # fmt: skip
    return state_factor, clean_factor


class PararealLoop:
    """One solve. Blocks before `front` are final for all samples, and all blocks for the samples not in `active`."""

    def __init__(self, task: Task, edges: list[int]) -> None:
        self.task, self.chain, self.edges = task, task.chain, edges
        self.memory: PararealMemory = task.memory
        self.state_factor, self.clean_factor = (table.tolist() for table in step_factors(self.chain))
        self.denoised_coef = self.chain.denoised_coef.cpu().double().tolist()
        self.window = Window(self.chain.num_steps, self.chain.batch, self.chain.num_steps)
        self.progress = Progress(self.window)
        self.front, self.active = 0, list(range(self.chain.batch))
        self.residual = torch.full((self.chain.batch,), math.inf, dtype=torch.float64)
        self.broken, self.moved = False, self.residual
        self.chain.sq_diff.zero_(), self.chain.sq_norm.zero_()

    @property
    def done(self) -> bool:
        return not self.active or self.progress.stopped or self.progress.rounds >= self.task.max_rounds

    def run(self) -> Progress:
        complete = self._begin() if self.task.warm else self._coarse_sweep(first=True)
        while complete and self.active and not self.progress.stopped:
            self._fine_steps()
            if self.done:
                break
            complete = self._coarse_sweep(first=False)
        return self.progress

    def _evaluate(self, steps: list[int], exact: int) -> Tensor:
        """Evaluate those timesteps of the active samples; exact: one whose state is the serial chain's.

        Returns the rows, i B + b, on the device.
        """
        flat = self._rows(steps)
        self.progress.rounds += 1
        self.chain.lo.fill_(exact), self.chain.hi.fill_(steps[-1] + 1)
        self.task.evaluate(Rows(flat, steps[0], steps[-1] + 1, len(flat)), self.progress.rounds)
        flat = flat.to(self.chain.states.device)
        self._squared_size(self.chain.predictions.flatten(0, 1)[flat], flat)
        return flat

    def _rows(self, steps: list[int]) -> Tensor:
        return (torch.tensor(steps)[:, None] * self.chain.batch + torch.tensor(self.active)).flatten()

    def _squared_size(self, values: Tensor, flat: Tensor) -> Tensor:
        """The squared size of values of those rows. Raises NonFiniteError where the model or the chain broke them."""
        size = values.square().sum(1, dtype=self.chain.sq_norm.dtype)
        if math.isfinite(float(size.sum())):
            return size
        for row in flat[~size.isfinite()].tolist():
            step, sample = divmod(row, self.chain.batch)
            self.task.blame(step, sample, self.progress.rounds)
        self.broken = True  # a wild iterate did it; the blocks before it are sound, and the next sweep starts there
        return size

    def _report(self) -> None:
        self.progress.trace.append(self.residual.clone())
        self.progress.stopped = self.task.report(self.progress.rounds, self.window, self.progress.trace[-1]) is True
        for b in set(range(self.chain.batch)).difference(self.active):
            self.residual[b] = 0.0

    def _begin(self) -> bool:
        """G from a given trajectory: one round. Returns that it went through, as `_coarse_sweep` does."""
        self._evaluate(self.edges[:-1], 0)
        samples = torch.tensor(self.active, device=self.chain.states.device)
        for j in range(len(self.edges) - 1):
            self.memory.coarse[j, samples] = self._long_step(j, samples)
        self._report()
        return True

    def _fine_steps(self) -> None:
        """The real steps inside all blocks that are not final, then the front block's end is exact."""
        chain, edges, states = self.chain, self.edges, self.chain.states.flatten(0, 1)
        blocks = range(self.front, len(edges) - 1)
        steady = edges[self.front + 1] - 1
        last = max(edges[j + 1] - edges[j] for j in blocks) - 1
        for k in range(last + 1):
            inside = [j for j in blocks if edges[j] + k < edges[j + 1]]
            steps = [edges[j] + k for j in inside]
            if k and self.done:
                return
            flat = self._evaluate(steps, min(edges[self.front] + k, steady)) if k else self._rows(steps)
            flat = flat.to(states.device)
            step = flat // chain.batch
            a, b = (t[:, 0].to(states.dtype)[step, None] for t in (chain.state_coef, chain.model_coef))
            new = a * states[flat] + b * chain.predictions.flatten(0, 1)[flat]
            if chain.drift is not None:
                new += chain.drift.flatten(0, 1)[flat]
            chain.sq_norm.view(-1)[flat] = self._squared_size(new, flat)
            for j, rows in zip(inside, new.view(len(inside), len(self.active), -1)):
                target = self.memory.fine[j] if edges[j] + k + 1 == edges[j + 1] else chain.states[edges[j] + k + 1]
                target[self.active] = rows
            if k == last:
                self._advance()
            if k:
                self._report()

    def _advance(self) -> None:
        """The front block's end is what its own steps say."""
        end, fine = self.edges[self.front + 1], self.memory.fine[self.front]
        self.moved = self._move(end, fine[self.active])
        self.front += 1
        for b in self.active:
            self.window.lo[b] = end
        if end == self.chain.num_steps:
            self.residual[self.active] = self.moved
            self.active = []

    def _coarse_sweep(self, first: bool) -> bool:
        """The long steps over all blocks from the front on, corrected by what is known of them; first: nothing is.

        Returns whether it got to the end: where the rounds ran out before, nothing was asked about the later blocks.
        """
        worst = torch.full((len(self.active),), math.inf, dtype=torch.float64) if first else self.moved
        samples = torch.tensor(self.active, device=self.chain.states.device)
        for j in range(self.front, len(self.edges) - 1):
            if self.done:
                return False
            self._evaluate([self.edges[j]], self.edges[self.front])
            new = self._long_step(j, samples)
            known = self.memory
            correction = torch.zeros_like(new) if first else known.fine[j, samples] - known.coarse[j, samples]
            self.memory.coarse[j, samples] = new
            worst = torch.maximum(worst, self._move(self.edges[j + 1], new + correction.nan_to_num_(0.0, 0.0, 0.0)))
            if j == len(self.edges) - 2:
                self._mark_final(worst)
            self._report()
        return True

    def _mark_final(self, worst: Tensor) -> None:
        """Which samples are final after a sweep in which their block ends moved by that much."""
        self.progress.repairs += self.broken
        self.broken = False
        self.residual[self.active] = worst
        for b in list(self.active):
            if float(self.residual[b]) <= self.task.rule.finish:
                self.active.remove(b)
                self.window.lo[b] = self.chain.num_steps

    def _move(self, state: int, new: Tensor) -> Tensor:
        """Set that state of the active samples; (len(active),) float64: how far it moved, relative to its size."""
        chain = self.chain
        size = new.square().sum(1, dtype=chain.sq_norm.dtype)
        moved = (new - chain.states[state, self.active]).square().sum(1, dtype=chain.sq_norm.dtype)
        chain.states[state, self.active] = new
        chain.sq_norm[state - 1, self.active] = size
        return (moved / size.clamp_min(TINY_OF[size.dtype])).sqrt().cpu().double().nan_to_num(math.inf, math.inf)

    def _long_step(self, j: int, samples: Tensor) -> Tensor:
        """G: block j from its beginning, the clean sample predicted there held to its end; (n, D)."""
        chain, begin = self.chain, self.edges[j]
        of_state, of_clean = 1.0, 0.0
        carried: Tensor | float = 0.0
        for i in range(begin, self.edges[j + 1]):
            factor = self.state_factor[i]
            of_state, of_clean = factor * of_state, factor * of_clean + self.clean_factor[i]
            if chain.drift is not None:
                carried = self.state_factor[i] * carried + chain.drift[i, samples]
        p, q = self.denoised_coef[begin] if of_clean else (0.0, 0.0)
        state, prediction = chain.states[begin, samples], chain.predictions[begin, samples]
        long: Tensor = (of_state + of_clean * p) * state + of_clean * q * prediction + carried
        return long
