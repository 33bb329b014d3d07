"""Inversion of multistep schedules: passes over a one-step chain on the same levels, corrected from pass to pass."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .._types import FrozenNoise
from ..engine.system import System
from ..schedule import Schedule
from ..schedule.noise import fill_drift
from .base import InversionInfo, InversionStats, Method, Outcome, Task

INNER = 0.01  # of the last change: how well a pass has to solve its chain; secants of sloppier passes lead astray
HOLDS = 0.3  # of the tolerance: the change of the corrections, as an error of the image, that counts as none
COARSE = 0.03  # the tolerance of the first pass
SECANTS, RIDGE = 10, 1e-8
ABORT_RATIO = 8  # passes without progress


def one_step(schedule: Schedule) -> Schedule:
    """x' = signal' x0 + sigma' eps with x0 and eps as the output predicts them (DDIM, Song et al. 2020, arXiv
    2010.02502, equation 12), between the levels of any schedule. Its "noise" of coefficient one takes the corrections.

    An output that does not enter x0 is not used: such a step rescales its state.
    """
    p, q = schedule.denoised_coef().unbind(1)
    signal, sigma = schedule.signal, schedule.sigma
    size = torch.hypot(signal, sigma)
    scale = (sigma[1:].square() - schedule.noise_coef.square()).clamp_min(0).sqrt() / sigma[:-1]
    clean = signal[1:] - signal[:-1] * scale
    state, model = scale + clean * p, clean * q
    known = (q != 0) & state.isfinite() & model.isfinite()
    state, model = torch.where(known, state, size[1:] / size[:-1]), torch.where(known, model, 0.0)
    ones = torch.ones_like(state)
    return replace(
        schedule, state_coef=state[:, None], model_coef=model[:, None], noise_coef=ones, draws=ones.bool(),
        name=f"{schedule.name}, one step",
    )  # fmt: skip


def solve(method: Method, task: Task, passes: int) -> Outcome:
    """Invert a schedule with lags by a method for one-step chains.

    Earlier states are unknown where a chain is run backwards, so the system is not triangular. A pass inverts
    x_{i+1} = G_i(x_i) + c_i, with the step G_i of `one_step` and the corrections c fixed: frozen noise and what the
    multistep rule adds, at the states of the pass before. Corrections are of second order in the step size, so passes
    contract; Anderson's method (multisecant, as in Fang and Saad 2009, doi 10.1002/nla.617) speeds them up.
    passes: the most of them. One pass leaves the lagged terms out.
    """
    return _Passes(method, task, passes).run()


class _Passes:
    """One solve; corrections are (T, B, *shape)."""

    def __init__(self, method: Method, task: Task, passes: int) -> None:
        self.method, self.task, self.passes = method, task, passes
        self.chain = one_step(task.schedule)
        self.system = System(task.model, task.schedule, task.image, task.model_kwargs, task.max_batch)
        shape, steps = tuple(task.image.shape), task.schedule.num_steps
        self.drift = torch.zeros(steps, *shape, dtype=self.system.dtype, device=task.image.device)
        if task.schedule.stochastic:
            fill_drift(self.drift.flatten(2), task.schedule, shape, task.generators(), task.image.dtype)
        size = torch.hypot(self.chain.signal, self.chain.sigma)  # what a miss of a row becomes on its way to the image
        self.weight = self._column(size[-1] / size[1:])
        self.stats = InversionStats(method.name, steps)
        self.secants: list[tuple[Tensor, Tensor]] = []

    def run(self) -> Outcome:
        task, stats = self.task, self.stats
        correction, trajectory = self.drift.clone(), task.init
        if trajectory is not None:
            correction = self._corrections(trajectory)
        change = torch.full((task.batch,), float("inf") if trajectory is None else 0.0)  # a given start is not coarse
        best, kept, since, traces = torch.full_like(change, float("inf")), None, 0, []
        outcome: Outcome | None = None
        for _ in range(self.passes):
            outcome = self._pass(correction, trajectory, float(change.max()))
            traces.append(outcome.stats.residual_trace)
            trajectory = outcome.trajectory
            assert trajectory is not None
            kept = trajectory.clone() if kept is None else kept
            if stats.stop_reason == "callback" or self.passes == 1:
                break
            miss = self._corrections(trajectory) - correction
            miss = torch.where(miss.isfinite(), miss, 0)
            change = self._size(miss)
            better = change < best
            kept[:, better.to(kept.device)] = trajectory[:, better.to(kept.device)]
            since = 0 if bool((change < 0.9 * best).any()) else since + 1
            best = torch.minimum(change, best)
            if bool((best <= HOLDS * task.tol).all()) or since >= ABORT_RATIO or self._left() == 0:
                break
            correction = self._next(correction, miss)
        assert outcome is not None
        assert kept is not None
        held = outcome.converged & (best <= HOLDS * task.tol)
        if stats.stop_reason != "callback":
            stats.stop_reason = "converged" if bool(held.all()) else "max_rounds"
        stats.residual_trace = torch.cat(traces) if all(len(trace) for trace in traces) else traces[-1]
        stats.model_evals += self.system.model_evals
        stats.model_calls += self.system.model_calls
        stats.notes.append(f"{len(traces)} passes over the one-step chain of a multistep schedule")
        return Outcome(kept[0].clone(), kept, held, stats)

    def _pass(self, correction: Tensor, init: Tensor | None, change: float) -> Outcome:
        tol = max(0.1 * HOLDS * self.task.tol, min(COARSE, INNER * change))
        tol = self.task.tol if self.passes == 1 else tol
        before, report = self.stats.rounds, self.task.report

        def shifted(info: InversionInfo) -> object:
            assert report is not None
            return report(replace(info, round=info.round + before, max_rounds=info.max_rounds + before))

        outcome = self.method.solve(
            replace(
                self.task, schedule=self.chain, generator=FrozenNoise(correction), init=init, tol=tol,
                max_rounds=self._left() or (None if self.task.max_rounds is None else 1),
                report=None if report is None else shifted,
            )
        )  # fmt: skip
        self.stats.add(outcome.stats)
        self.stats.window = outcome.stats.window
        self.stats.stop_reason = outcome.stats.stop_reason
        return outcome

    def _left(self) -> int | None:
        """Rounds that are left, or None without a limit."""
        limit = self.task.max_rounds
        return None if limit is None else max(limit - self.stats.rounds, 0)

    def _corrections(self, trajectory: Tensor) -> Tensor:
        """(T, B, *shape): the schedule's steps from these states, less those of the one-step chain."""
        system, steps, batch = self.system, self.task.schedule.num_steps, self.task.batch
        states = trajectory.to(system.dtype)
        flat = states[:-1].reshape(steps * batch, -1)
        row = torch.arange(steps * batch, device=flat.device)
        found = [
            system.predict(flat[a:b], row[a:b] // batch, system.expand_kwargs(row[a:b] % batch))
            for a, b in system.chunks(len(flat))
        ]
        self.stats.rounds += 1
        outputs = torch.cat(found).view_as(states[:-1])
        total = self.drift - self._column(self.chain.state_coef[:, 0]) * states[:-1]
        total -= self._column(self.chain.model_coef[:, 0]) * outputs
        schedule = self.task.schedule
        for lag in range(min(schedule.lags, steps)):
            total[lag:] += self._column(schedule.state_coef[lag:, lag]) * states[: steps - lag]
            total[lag:] += self._column(schedule.model_coef[lag:, lag]) * outputs[: steps - lag]
        return total

    def _next(self, correction: Tensor, miss: Tensor) -> Tensor:
        """Anderson's step, sample by sample; rows count by what they do to the image."""
        self.secants = [*self.secants[-SECANTS:], (correction, miss)]
        out = correction + miss
        for b in range(self.task.batch):
            last = (self.weight * miss)[:, b].flatten().double()
            pairs = [(c[:, b], m[:, b]) for c, m in self.secants[:-1]]
            if not pairs:
                break
            slopes = torch.stack([(self.weight[:, 0] * (m - miss[:, b])).flatten().double() for _, m in pairs], 1)
            norm = slopes.norm(dim=0).clamp_min(1e-300)
            unit = slopes / norm
            gram = unit.mT @ unit + RIDGE * torch.eye(len(pairs), dtype=unit.dtype, device=unit.device)
            gamma = torch.linalg.solve(gram, unit.mT @ last) / norm
            for share, (c, m) in zip(gamma.tolist(), pairs, strict=True):
                out[:, b] -= share * (c + m - correction[:, b] - miss[:, b])
        return torch.where(out.isfinite(), out, correction)

    def _size(self, miss: Tensor) -> Tensor:
        """(B,) on the CPU: what the misses of all rows make together, as a relative error of the image."""
        total = (self.weight * miss).sum(0).flatten(1).norm(dim=1)
        size: Tensor = self.task.image.flatten(1).norm(dim=1).clamp_min(1e-30)
        apart: Tensor = (total / size).cpu()
        return apart

    def _column(self, values: Tensor) -> Tensor:
        column: Tensor = values.to(self.task.image.device, self.system.dtype).view(-1, *[1] * self.task.image.dim())
        return column
