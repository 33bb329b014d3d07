"""One distillation: the model's own chains, then stages of chains that the draft makes, predictions there, and a fit.

The model is asked along chains of its own, and along those that the draft makes of the same noises, stage after stage,
since that is where a solve begins (dataset aggregation, Ross, Gordon and Bagnell 2011, arXiv 1011.0686).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..model.draft import Draft
from ..model.draft_conditions import conditions_of
from ..model.draft_levels import DraftLevels
from ..schedule import SpectralSlope
from .chains import draw_grids, start_size, walk
from .checkpoint import Checkpoint
from .fit import Fit
from .linear_part import LinearPart, choose_width, linear_part
from .prediction_pairs import MOST_BYTES, PairStore, pairs_of
from .teacher import Teacher

CHAINS = 0.12  # part of the time for the model's own chains
ALONE = ((0.0, 1.0),)  # of a recording: nothing but a fit
STAGES = ((0.07, 0.14), (0.07, 0.22), (0.06, 0.32))  # parts for predictions along the draft's chains, and for the fit
FEWEST, MOST, COUNTED = 4, 512, 32  # chains; where steps are counted and not seconds
NEAREST = 0.25  # the states asked lie at least that far from the model's chain towards the draft's
LEAST_STEPS = 50  # of a fit, however little time is left
SAVE_SECONDS = 30.0

_log = logging.getLogger("deqdiff_fast")


class Limits(NamedTuple):
    """seconds: for everything but the last measurement. steps: of the optimizer in all, None for as many as fit."""

    seconds: float
    steps: int | None
    seed: int


class Chains(NamedTuple):
    """The model's own: states (S, n, D), their timesteps' indices (S, n), conditions (n,)."""

    states: Tensor
    grid: Tensor
    condition: Tensor


class Job:
    """See `distill`.

    Args:
        show: called with (seconds spent, what is going on).
        stage_done: called after every stage; what it returns is shown.
    """

    def __init__(
        self, teacher: Teacher, limits: Limits, checkpoint: Checkpoint, show: Callable[[float, str], object],
        stage_done: Callable[[Job], str],
    ) -> None:  # fmt: skip
        self.teacher, self.limits, self.checkpoint = teacher, limits, checkpoint
        self.show, self.stage_done = show, stage_done
        self.levels = DraftLevels.of(teacher.schedule)
        self.draw = torch.Generator().manual_seed(limits.seed + 10**6)
        self.began, self.row_seconds, self.note = time.perf_counter(), 0.0, ""
        self.stages: tuple[tuple[float, float], ...] = STAGES
        self.chains: Chains | None = None

    @property
    def spent(self) -> float:
        """Seconds, those before an interruption included."""
        return time.perf_counter() - self.began

    def run(self, recording: Any = None) -> Draft:
        """All of it."""
        saved, first, fit_state = self.checkpoint.load(), 0, None
        with torch.no_grad():
            if saved is not None:
                first, fit_state = self._restore(*saved)
                _log.info("going on with an unfinished distillation, after %.0f s", self.spent)
            elif recording is not None:
                self.stages = ALONE
                self.store, samples = pairs_of(recording, self.levels, self.teacher.shape)
                self._new_draft(linear_part(samples))
            else:
                self._own_chains()
            for stage in range(first, len(self.stages)):
                if saved is None or stage > first:
                    self._ask_along_the_draft(stage)
                    self._save_rows(stage)
                self._fit(stage, fit_state if stage == first else None)
                if stage + 1 < len(self.stages):
                    self.note = self.stage_done(self)
        return self.draft

    def _own_chains(self) -> None:
        """The model along its own chains; from their samples the draft's linear part."""
        teacher = self.teacher
        grid = draw_grids(teacher.schedule, MOST, self.draw)
        count = self._count_chains(len(grid))
        grid, condition = grid[:, :count], torch.arange(count) % teacher.conditions
        noise = torch.randn(count, math.prod(teacher.shape), generator=self.draw)
        noise *= start_size(teacher.schedule, int(grid[0, 0]))
        at = condition.to(teacher.device)

        def predict(states: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
            said = teacher.checked(states, step, at)
            return said, teacher.clip(said, states, step)

        noise = noise.to(teacher.device, teacher.rows.dtype)
        show = lambda: self.show(self.spent, "the model's own chains")  # noqa: E731
        began = self.spent
        states, said, samples = walk(teacher.schedule, predict, noise, grid, show)
        self.row_seconds = (self.spent - began) / grid.numel()
        self.store = PairStore(teacher.pooled)
        flat = grid.flatten().to(teacher.device)
        self.store.add(*teacher.inputs(states.flatten(0, 1), flat), said, condition.repeat(len(grid)))
        self.chains = Chains(states, grid, condition)
        self._new_draft(linear_part(samples.view(count, *teacher.shape)))

    def _count_chains(self, steps: int) -> int:
        """How many chains of that length fit into time and memory; measures what a row costs.

        Raises:
            ValueError: none do.
        """
        size = math.prod(self.teacher.shape)
        self.row_seconds = self.teacher.time_row(COUNTED, self.draw)
        room = MOST_BYTES // (8 * size * steps * 3)
        if self.limits.steps is not None:
            return max(min(COUNTED, room), FEWEST)
        fits = int(CHAINS * self.limits.seconds / (self.row_seconds * steps))
        if fits < 1:
            least = FEWEST * self.row_seconds * steps / CHAINS / 60
            raise ValueError(
                f"minutes: expected at least {least:.2g} for a model whose call takes {self.row_seconds:.2g} s for a "
                f"row, got {self.limits.seconds / 60:.2g}; or give a recording of solves"
            )
        return max(min(fits, MOST, room), FEWEST)

    def _new_draft(self, part: LinearPart) -> None:
        """An untrained draft, of a width that is cheap beside the model."""
        self.part = part
        known = 0.0 if self.limits.steps is not None else self.row_seconds  # counted steps: the same draft every time
        self.draft = choose_width(self._make, self.teacher.shape, known)

    def _make(self, width: int) -> Draft:
        (spectrum, mean, scale), teacher = self.part, self.teacher
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.limits.seed)
            draft = Draft(
                self.levels, spectrum, teacher.schedule.prediction_type, mean=mean, scale=scale, width=width,
                conditions=conditions_of(self.store.pooled),
            )  # fmt: skip
        if draft.embed is not None:
            draft.embed.normalise_like(self.store.pooled)
        return draft.ready(teacher.device)

    def _ask_along_the_draft(self, stage: int) -> None:
        """States between the model's chains and the draft's, and what the model says there."""
        if self.chains is None:  # a recording is all there is
            return
        teacher, (states, grid, condition) = self.teacher, self.chains
        at = condition.to(teacher.device)
        pooled = {name: value.to(teacher.device)[at] for name, value in teacher.pooled.items()}

        def predict(x: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
            inputs, times = teacher.inputs(x, step)
            said = self.draft.predict(inputs.float(), times, pooled).flatten(1).to(x.dtype)
            return said, teacher.clip(said, x, step)

        show = lambda: self.show(self.spent, f"stage {stage + 1}: chains of the draft")  # noqa: E731
        trail = walk(teacher.schedule, predict, states[0], grid, show)[0]
        usable = (trail.isfinite().all(-1) & (trail - states).abs().amax(-1).gt(0)).cpu().flatten().nonzero()[:, 0]
        most = len(usable)
        if self.limits.steps is None:
            most = int(self.stages[stage][0] * self.limits.seconds / max(self.row_seconds, 1e-9))
        room = MOST_BYTES // (8 * states.shape[-1]) - self.store.rows
        chosen = usable[torch.randperm(len(usable), generator=self.draw)[: max(min(most, room), 1)]]
        share = NEAREST + (1 - NEAREST) * torch.rand(len(chosen), 1, generator=self.draw)
        where = chosen.to(teacher.device)
        begin, end = states.flatten(0, 1)[where], trail.flatten(0, 1)[where]
        mixed = torch.lerp(begin, end, share.to(begin))
        step, owner = grid.flatten()[chosen].to(teacher.device), condition.repeat(len(grid))[chosen]
        until = self.spent + self.stages[stage][0] * self.limits.seconds if self.limits.steps is None else math.inf
        for start in range(0, len(chosen), piece := max(teacher.rows.max_batch or 64, 1)):
            if start and self.spent > until:  # the machine is slower than it was
                break
            self.show(self.spent, f"stage {stage + 1}: the model along them")
            part = slice(start, start + piece)
            said = teacher(mixed[part], step[part], owner[part].to(teacher.device))
            fine = said.isfinite().all(1).cpu()
            inputs, times = teacher.inputs(mixed[part], step[part])
            first = self.store.add(inputs[fine], times[fine], said[fine], owner[part][fine])
            self.store.pair(chosen[part][fine], first + torch.arange(int(fine.sum())))

    def _fit(self, stage: int, saved: dict[str, Any] | None) -> None:
        """Fit to all pairs so far, until the stage's part of the time is over."""
        fit = Fit(self.draft, self.store, self.limits.seed + stage, self.teacher.device)
        if saved is not None:
            fit.restore(saved["fit"])
        began, last = self.spent if saved is None else saved["began"], [self.spent]
        end = 1 - sum(sum(shares) for shares in self.stages[stage + 1 :])  # part of all the time
        fits = sum(fitting for _, fitting in self.stages)

        def progress() -> float:
            if self.limits.steps is not None:
                return fit.steps / max(round(self.limits.steps * self.stages[stage][1] / fits), 1)
            part = (self.spent - began) / max(end * self.limits.seconds - began, 1e-9)
            return part if fit.steps >= LEAST_STEPS else max(min(part, 0.99), 0.0)

        def after_step(fit: Fit) -> None:
            self.show(self.spent, f"stage {stage + 1}: fit, {fit.missed:.0%} of a difference missed{self.note}")
            if self.spent - last[0] > SAVE_SECONDS:
                last[0] = self.spent
                self._save_state(stage, began, fit)

        self._save_state(stage, began, fit)
        try:
            fit.run(progress, after_step)
        except BaseException:  # interrupted: to be taken up again
            self._save_state(stage, began, fit)
            raise
        sizes = f"{self.store.rows} predictions, {len(self.store.pairs)} pairs, {fit.steps} steps"
        _log.info("stage %d: %s, %.0f%% of a difference missed, %.0f s", stage + 1, sizes, 100 * fit.missed, self.spent)

    def _save_rows(self, stage: int) -> None:
        chains = None if self.chains is None else [self.chains.grid, self.chains.condition]
        spectrum, mean, scale = self.part
        part = [spectrum.variance, spectrum.channels, mean, scale]
        facts = {"stage": stage, "chains": chains, "part": part, "width": self.draft.width, "cost": self.row_seconds}
        self.checkpoint.save_rows(facts | self.store.state())

    def _save_state(self, stage: int, began: float, fit: Fit) -> None:
        self.checkpoint.save_state({"stage": stage, "began": began, "spent": self.spent, "fit": fit.state()})

    def _restore(self, rows: dict[str, Any], state: dict[str, Any]) -> tuple[int, dict[str, Any] | None]:
        """The stage to go on with, and its fit where that had begun."""
        self.store, self.row_seconds = PairStore.of_state(rows), rows["cost"]
        self.began = time.perf_counter() - state["spent"]
        variance, channels, mean, scale = rows["part"]
        self.part = SpectralSlope(variance, channels), mean, scale
        self.draft = self._make(rows["width"])
        self.draft.load_state_dict(state["fit"]["draft"])
        if rows["chains"] is None:
            self.stages = ALONE
        else:
            grid, condition = rows["chains"]
            scales = self.teacher.schedule.input_scale[grid].flatten()
            states = rows["rows"][0][: grid.numel()].flatten(1) / scales[:, None]
            states = states.to(self.teacher.device, self.teacher.rows.dtype).view(*grid.shape, -1)
            self.chains = Chains(states, grid, condition)
        return rows["stage"], state if state["stage"] == rows["stage"] else None
