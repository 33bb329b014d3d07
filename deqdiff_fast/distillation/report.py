"""Whether a draft pays: rounds, evaluations and seconds of solves with it and without, and of the serial chain."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ..model.draft import Draft
from ..planner.measure import measure
from ..sampler import DEQSampler
from ..schedule import Schedule, SpectralSlope
from ..solution import Solution
from .teacher import Teacher

ROWS = 8  # of a batched call that is timed
REPEATS, MOST_SECONDS = 5, 2.0


@dataclass(frozen=True)
class DraftReport:
    """Medians over a few single samples, each solved at its own stopping. `print` it."""

    steps: int
    """T of the chains."""
    samples: int
    rounds: float
    rounds_without: float
    """Of "quasi-newton", with the same spectrum."""
    evaluations: float
    evaluations_without: float
    """Model evaluations of a solve, over T."""
    error: float
    """The largest relative error of the samples with the draft, against the serial chain's."""
    cost: float
    """Seconds of a call of the draft on one row, over those of the model."""
    cost_of_row: float
    """The same for a row of a batch of some rows."""
    seconds: float
    seconds_without: float
    seconds_serial: float

    @property
    def pays(self) -> bool:
        """Whether solves with it were faster than those without, here and now."""
        return self.seconds < self.seconds_without

    def __str__(self) -> str:
        best = "than the serial chain too" if self.seconds < self.seconds_serial else "but the serial chain is faster"
        summary = (
            f"It pays: faster than without, {best}." if self.pays else "It does not pay here: no faster than without."
        )
        return (
            f"T = {self.steps}, {self.samples} samples: {self.rounds:g} rounds and {self.evaluations:.2f} T "
            f"evaluations with the draft, {self.rounds_without:g} and {self.evaluations_without:.2f} T without; "
            f"largest error {self.error:.1e}; a call of the draft costs {self.cost:.2f} of the model's, a row of a "
            f"batch {self.cost_of_row:.2f}; {self.seconds:.2f} s with it, {self.seconds_without:.2f} s without, serial "
            f"chain {self.seconds_serial:.2f} s. {summary}"
        )


class Trial:
    """Solves of single samples, with a draft and without.

    Args:
        schedule: the chain.
        seed: of the noises.
    """

    def __init__(self, teacher: Teacher, schedule: Schedule, seed: int) -> None:
        self.teacher, self.schedule, self.seed = teacher, schedule, seed

    def noise(self, k: int) -> tuple[Tensor, dict[str, Any], torch.Generator]:
        """(1, *shape) number k, its keyword arguments, and the generator of the chain's own noise."""
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + k)
        noise = torch.randn(1, *self.teacher.shape, generator=draw) * self.schedule.init_noise_sigma
        condition = torch.tensor([k % self.teacher.conditions], device=self.teacher.device)
        return noise.to(self.teacher.device, self.teacher.dtype), self.teacher.kwargs_of(condition), draw

    def sampler(self, solver: str, draft: Draft | None = None, spectrum: SpectralSlope | None = None) -> DEQSampler:
        """One that solves in rounds over all timesteps."""
        return DEQSampler(self.teacher.call, self.schedule, solver=solver, draft=draft, spectrum=spectrum)

    def solve(self, k: int, draft: Draft, without: bool = False) -> Solution:
        """Sample number k, by the draft, or without it but with its spectrum."""
        noise, kwargs, draw = self.noise(k)
        used, solver = (None, "quasi-newton") if without else (draft, "draft")
        with torch.no_grad():
            return self.sampler(solver, used, draft.spectrum).sample(noise, kwargs, draw)

    def serial(self, k: int) -> Solution:
        """The plain chain of the same."""
        noise, kwargs, draw = self.noise(k)
        with torch.no_grad():
            return self.sampler("quasi-newton").serial(noise, kwargs, draw)

    def costs(self, draft: Draft) -> tuple[float, float]:
        """Seconds of the draft over those of the model: of a call on one row, and of a row of a batch."""
        noise, kwargs, _ = self.noise(0)
        system = self.sampler("draft", draft).options.system(noise, kwargs)
        assert system.draft is not None
        call, row = (
            [measure(what, noise, n, repeats=REPEATS, budget=MOST_SECONDS) for what in (system.draft.model, system)]
            for n in (1, ROWS)
        )
        return call[0] / call[1], row[0] / row[1]

    def report(self, draft: Draft, samples: int) -> DraftReport:
        """`samples` solves of each kind, after one each that prepares."""
        with_draft, without, serial, errors = [], [], [], []
        for skipped in (False, True):
            self.solve(0, draft, skipped)
        for k in range(samples):
            with_draft.append(self.solve(k, draft))
            without.append(self.solve(k, draft, without=True))
            serial.append(self.serial(k))
            exact = serial[-1].sample.double()
            errors.append(float((with_draft[-1].sample.double() - exact).norm() / exact.norm()))
        steps = self.schedule.num_steps
        one, row = self.costs(draft)
        return DraftReport(
            steps=steps, samples=samples,
            rounds=median(s.stats.rounds for s in with_draft), rounds_without=median(s.stats.rounds for s in without),
            evaluations=median(s.stats.model_evals for s in with_draft) / steps,
            evaluations_without=median(s.stats.model_evals for s in without) / steps,
            error=max(errors), cost=one, cost_of_row=row,
            seconds=median(s.stats.wall_seconds for s in with_draft),
            seconds_without=median(s.stats.wall_seconds for s in without),
            seconds_serial=median(s.stats.wall_seconds for s in serial),
        )  # fmt: skip
