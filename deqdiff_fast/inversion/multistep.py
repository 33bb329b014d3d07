"""Inversion of multistep schedules: passes over a one-step chain on the same levels, corrected from pass to pass."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .._devices import float64
from .._types import FrozenNoise
from ..gradient.fixed_point_map import draw_drift
from ..kernels.stopping import MAX_RATE, TINY_OF
from ..schedule import Schedule
from .base import InversionInfo, InversionProblem, InversionStats, Method, MethodResult

PASS_TOL = 0.01  # of the last change: how well a pass has to solve its chain; secants of sloppier passes lead astray
CHANGE_TOL = 0.3  # of the tolerance: the change of the corrections, as an error of the image, that counts as none
FIRST_PASS_TOL = 0.03
SECANTS, RIDGE = 10, 1e-8
PATIENCE = 8  # passes without progress


def one_step(schedule: Schedule) -> Schedule:
    """x' = signal' x0 + sigma' eps with x0 and eps as the output predicts them (DDIM, Song et al. 2020, arXiv
    2010.02502, equation 12), between the levels of any schedule. Its "noise" of coefficient one takes the corrections.

    An output that does not enter x0 is not used: such a step rescales its state.
    """
    p, q = schedule.denoised_coef().unbind(1)
    signal, sigma = schedule.signal, schedule.sigma
    size = torch.hypot(signal, sigma)
    scale = (sigma[1:].square() - schedule.noise_coef.square()).clamp_min(0).sqrt() / sigma[:-1]
    x0_coef = signal[1:] - signal[:-1] * scale
    state, model = scale + x0_coef * p, x0_coef * q
    known = (q != 0) & state.isfinite() & model.isfinite()
    state, model = torch.where(known, state, size[1:] / size[:-1]), torch.where(known, model, 0.0)
    ones = torch.ones_like(state)
    return replace(
        schedule, state_coef=state[:, None], model_coef=model[:, None], noise_coef=ones, draws=ones.bool(),
        name=f"{schedule.name}, one step",
    )  # fmt: skip


def solve(method: Method, problem: InversionProblem, passes: int) -> MethodResult:
    """Invert a schedule with lags by a method for one-step chains.

    Earlier states are unknown where a chain is run backwards, so the system is not triangular. A pass inverts
    x_{i+1} = G_i(x_i) + c_i, with the step G_i of `one_step` and the corrections c fixed: frozen noise and what the
    multistep rule adds, at the states of the pass before. Corrections are of second order in the step size, so passes
    contract; Anderson's method (multisecant, as in Fang and Saad 2009, doi 10.1002/nla.617) speeds them up.

    Args:
        passes: the most of them. One pass leaves the lagged terms out.
    """
    return _MultistepSolve(method, problem, passes).run()


class _MultistepSolve:
    """One solve; corrections are (T, B, *shape)."""

    def __init__(self, method: Method, problem: InversionProblem, passes: int) -> None:
        self.method, self.problem, self.passes = method, problem, passes
        self.schedule = one_step(problem.schedule)
        self.system = problem.system()
        shape, steps = tuple(problem.image.shape), problem.schedule.num_steps
        drift = draw_drift(self.system, problem.generators())
        if drift is None:
            drift = torch.zeros(steps, *shape, dtype=self.system.dtype, device=problem.image.device)
        self.drift = drift.view(steps, *shape)
        size = torch.hypot(self.schedule.signal, self.schedule.sigma)
        self.weight = self._column(size[-1] / size[1:])  # what a miss of a row becomes on its way to the image
        self.stats = InversionStats(method.name, steps)
        self.secants: list[tuple[Tensor, Tensor]] = []

    def run(self) -> MethodResult:
        problem, stats = self.problem, self.stats
        correction, trajectory = self.drift.clone(), problem.init_trajectory
        if trajectory is not None:
            correction = self._corrections(trajectory)
        change = torch.full((problem.batch,), float("inf") if trajectory is None else 0.0)
        best, best_trajectory, since, traces = torch.full_like(change, float("inf")), None, 0, []
        for _ in range(self.passes):
            result = self._pass(correction, trajectory, float(change.max()))
            traces.append(result.stats.residual_trace)
            trajectory = result.trajectory
            assert trajectory is not None
            best_trajectory = trajectory.clone() if best_trajectory is None else best_trajectory
            if stats.stop_reason == "callback" or self.passes == 1:
                break
            miss = self._corrections(trajectory) - correction
            miss = torch.where(miss.isfinite(), miss, 0)
            change = self._image_error(miss)
            better = (change < best).to(best_trajectory.device)
            best_trajectory[:, better] = trajectory[:, better]
            since = 0 if bool((change < MAX_RATE * best).any()) else since + 1
            best = torch.minimum(change, best)
            if bool((best <= CHANGE_TOL * problem.tol).all()) or since >= PATIENCE or self._rounds_left() == 0:
                break
            correction = self._next_correction(correction, miss)
        assert best_trajectory is not None
        converged = result.converged & (best <= CHANGE_TOL * problem.tol)
        if stats.stop_reason != "callback":
            stats.stop_reason = "converged" if bool(converged.all()) else "max_rounds"
        stats.residual_trace = torch.cat(traces) if all(len(trace) for trace in traces) else traces[-1]
        stats.model_evals += self.system.model_evals
        stats.model_calls += self.system.model_calls
        stats.notes.append(f"{len(traces)} passes over the one-step chain of a multistep schedule")
        return MethodResult(best_trajectory[0].clone(), best_trajectory, converged, stats)

    def _pass(self, correction: Tensor, init_trajectory: Tensor | None, change: float) -> MethodResult:
        """Invert the one-step chain. change: of the last correction, Inf before the first unless there is a start."""
        problem, stats = self.problem, self.stats
        tol = max(0.1 * CHANGE_TOL * problem.tol, min(FIRST_PASS_TOL, PASS_TOL * change))
        before, report = stats.rounds, problem.report

        def shifted(info: InversionInfo) -> object:
            assert report is not None
            return report(replace(info, round=info.round + before, max_rounds=info.max_rounds + before))

        result = self.method.solve(
            replace(
                problem, schedule=self.schedule, generator=FrozenNoise(correction), init_trajectory=init_trajectory,
                tol=problem.tol if self.passes == 1 else tol,
                max_rounds=self._rounds_left() or (None if problem.max_rounds is None else 1),
                report=None if report is None else shifted,
            )
        )  # fmt: skip
        stats.add(result.stats)
        stats.window, stats.stop_reason = result.stats.window, result.stats.stop_reason
        return result

    def _rounds_left(self) -> int | None:
        """None without a limit."""
        limit = self.problem.max_rounds
        return None if limit is None else max(limit - self.stats.rounds, 0)

    def _corrections(self, trajectory: Tensor) -> Tensor:
        """(T, B, *shape): the schedule's steps from these states, less those of the one-step chain."""
        system, schedule, batch = self.system, self.problem.schedule, self.problem.batch
        steps, states = schedule.num_steps, trajectory.to(system.dtype)
        flat = states[:-1].reshape(steps * batch, -1)
        row = torch.arange(steps * batch, device=flat.device)
        parts = [
            system.predict(flat[a:b], row[a:b] // batch, system.expand_kwargs(row[a:b] % batch))
            for a, b in system.chunks(len(flat))
        ]
        self.stats.rounds += 1
        outputs = torch.cat(parts).view_as(states[:-1])
        total = self.drift - self._column(self.schedule.state_coef[:, 0]) * states[:-1]
        total -= self._column(self.schedule.model_coef[:, 0]) * outputs
        for lag in range(min(schedule.lags, steps)):
            total[lag:] += self._column(schedule.state_coef[lag:, lag]) * states[: steps - lag]
            total[lag:] += self._column(schedule.model_coef[lag:, lag]) * outputs[: steps - lag]
        return total

    def _next_correction(self, correction: Tensor, miss: Tensor) -> Tensor:
        """Anderson's step, sample by sample; rows count by what they do to the image."""
        self.secants = [*self.secants[-SECANTS:], (correction, miss)]
        out = correction + miss
        for b in range(self.problem.batch):
            last = float64((self.weight * miss)[:, b].flatten())
            pairs = [(c[:, b], m[:, b]) for c, m in self.secants[:-1]]
            if not pairs:
                break
            slopes = torch.stack([float64((self.weight[:, 0] * (m - miss[:, b])).flatten()) for _, m in pairs], 1)
            norm = slopes.norm(dim=0).clamp_min(1e-300)
            unit = slopes / norm
            gram = unit.mT @ unit + RIDGE * torch.eye(len(pairs), dtype=unit.dtype, device=unit.device)
            gamma = torch.linalg.solve(gram, unit.mT @ last) / norm
            for weight, (c, m) in zip(gamma.tolist(), pairs, strict=True):
                out[:, b] -= weight * (c + m - correction[:, b] - miss[:, b])
        return torch.where(out.isfinite(), out, correction)

    def _image_error(self, miss: Tensor) -> Tensor:
        """(B,) on the CPU: what the misses of all rows make together, as a relative error of the image."""
        total = self.problem.in_norm((self.weight * miss).sum(0)).norm(dim=1)
        size = self.problem.in_norm(self.problem.image).norm(dim=1).to(total.dtype)
        error: Tensor = (total / size.clamp_min(TINY_OF[total.dtype])).cpu()
        return error

    def _column(self, values: Tensor) -> Tensor:
        """(n,) -> (n, 1, ...), to multiply (n, B, *shape) with."""
        return values.to(self.system.device, self.system.dtype).view(-1, *[1] * self.problem.image.dim())
