"""`distill`: a draft of a model, out of the model's own predictions."""

from __future__ import annotations

import logging
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from .._devices import with_torch_defaults
from .._types import Model, parameters_of
from ..engine import arguments
from ..gradient.base import refuse_inference_mode
from ..model.draft import Draft
from ..model.recording import Recording
from ..schedule import Schedule
from .chains import thinned
from .checkpoint import Checkpoint
from .job import Job, Limits
from .report import Trial
from .teacher import Drawn, Teacher, inputs_like

TRIAL_STEPS = (
    50  # of the chains that are solved to see what a draft is worth, where the schedule has over twice as many
)
SAMPLES, ROUGH_COST = 3, 8  # solved at the end; model evaluations of that, a sample, over T
MEASURING, TRYING = 0.1, 0.02  # part of the time for that, and for a solve after each stage
DRAFT, SPECTRUM = "draft.safetensors", "spectrum.safetensors"

_log = logging.getLogger("deqdiff_fast")


@with_torch_defaults
def distill(
    model: Model,
    schedule: Schedule,
    shape: tuple[int, ...],
    model_kwargs: Drawn = None,
    minutes: float = 6.0,
    *,
    out: str | Path | None = None,
    recording: Recording | None = None,
    steps: int | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = False,
    measure: bool = True,
) -> Draft:
    """Make a draft of a model for `DEQSampler(draft=...)`: a small network fitted to the model's own predictions.

    No data is needed. The network is a perceptron for small data, convolutions for sequences, images, latents and
    volumes, and sees labels, pooled vectors and maps of the sample's own shape among the model's keyword arguments. A
    guided model is distilled as one, `DEQSampler` then gives the draft what it gives the guided model.

    Args:
        model: as for `DEQSampler`.
        schedule: a chain of the model. The draft serves other chains of the same model too; it knows the noise levels
            between the timesteps of this one by interpolation, so give it many of them (all of a DDPM schedule).
        shape: (C, ...), of one sample.
        model_kwargs: conditions that samples are to be drawn under: keyword arguments with one row for each condition,
            or a function that returns them for a number of conditions (the same ones every time, or `out` cannot go on
            with what was interrupted). Mark with `shared` what belongs to none.
        minutes: in all.
        out: a folder, in which draft.safetensors and spectrum.safetensors are written, where `load_model` finds them if
            it is the model's. What was interrupted is taken up again there.
        recording: predictions that solves have made, see `DEQSampler.record`. The model is not asked for more, but for
            `measure`.
        steps: of the optimizer, instead of as many as the time allows.
        seed: of noise and weights.
        device: of the model's inputs; None for that of its first parameter.
        progress: whether to show a bar, with the rounds that the draft would give now.
        measure: whether to solve some samples with the draft and without at the end: the draft's `report`, a
            `distillation.DraftReport`, says whether it pays, and is logged.

    Returns:
        The draft, in eval mode.

    Raises:
        TypeError, ValueError: a bad argument, by name. NonFiniteError, ModelOutputError: the model's fault.
        OSError: `out` cannot be written in.
    """
    refuse_inference_mode("distill")
    arguments.check_model(model)
    arguments.check_schedule(schedule)
    arguments.check_shape(shape)
    _check(minutes, steps, recording)
    teacher = Teacher(model, schedule, tuple(shape), model_kwargs, inputs_like(model, device))
    folder = None if out is None else Path(out)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    limits = Limits(60 * float(minutes) * (1 - MEASURING * measure), steps, seed)
    return _Distillation(teacher, limits, folder, recording, measure).run(60 * float(minutes), progress)


class _Distillation(NamedTuple):
    teacher: Teacher
    limits: Limits
    folder: Path | None
    recording: Recording | None
    measure: bool

    def run(self, seconds: float, progress: bool) -> Draft:
        """With a bar, files and a report, as they were asked for."""
        schedule, seed = self.teacher.schedule, self.limits.seed
        few = thinned(schedule, TRIAL_STEPS) if schedule.num_steps > 2 * TRIAL_STEPS else schedule
        trial = Trial(self.teacher, few, seed)
        checkpoint = Checkpoint(self.folder, _identity(self.teacher, seed, self.recording))
        with tqdm(
            total=round(seconds), desc="distilling", unit="s", file=sys.stderr, disable=not progress, dynamic_ncols=True
        ) as bar:

            def show(spent: float, what: str) -> None:
                bar.set_postfix_str(what, refresh=False)
                bar.update(min(int(spent), bar.total) - bar.n)

            def stage_done(job: Job) -> str:
                if not progress or _cost(job, trial) > TRYING * seconds:
                    return ""
                return f", {trial.solve(0, job.draft).stats.rounds} rounds now"

            job = Job(self.teacher, self.limits, checkpoint, show, stage_done)
            draft = job.run(self.recording)
        if self.folder is not None:
            draft.save(self.folder / DRAFT)
            draft.spectrum.save(self.folder / SPECTRUM)
            checkpoint.remove()
        if self.measure:
            affordable = int(MEASURING * seconds / max(_cost(job, trial) * ROUGH_COST / 2, 1e-9))
            draft.report = trial.report(draft, max(min(affordable, SAMPLES), 1))
            _log.info("%s", draft.report)
        return draft


def _cost(job: Job, trial: Trial) -> float:
    """Seconds that a solve may take: two evaluations a timestep."""
    return 2 * trial.schedule.num_steps * job.row_seconds


def _check(minutes: Any, steps: Any, recording: Any) -> None:
    """Raises TypeError or ValueError, naming the argument."""
    if minutes is None or arguments.positive("minutes", minutes) is None:
        raise ValueError(f"minutes: expected a number > 0, got {minutes!r}")
    arguments.count("steps", steps)
    if recording is not None and not isinstance(recording, Recording):
        raise TypeError(f"recording: expected a deqdiff_fast.Recording or None, got {type(recording).__name__}")


def _identity(teacher: Teacher, seed: int, recording: Recording | None) -> dict[str, Any]:
    """What an unfinished distillation must agree in to be gone on with."""
    schedule = teacher.schedule
    parameters = parameters_of(teacher.model)

    def total(values: list[Tensor]) -> float:
        return math.fsum(float(value.detach().double().sum()) for value in values)

    return {
        "shape": list(teacher.shape),
        "prediction_type": schedule.prediction_type,
        "schedule": [schedule.num_steps, total([schedule.timesteps, schedule.signal, schedule.sigma])],
        "model": [len(parameters), total(parameters)],
        "model_kwargs": [[name, list(v.shape), total([v])] for name, v in sorted(teacher.pooled.items())],
        "recording": 0 if recording is None else len(recording),
        "seed": seed,
    }
