"""Whether a batched call of the model says of every row what a call on that row alone says.

A parallel solve asks about many timesteps in one call. A model that takes one timestep for all of them (`t[0]`, a
window in `sigma[0]`), whose rows depend on each other (batch norm in training mode, attention across the batch), or
that is another one in every call (dropout, a cache) would end in another sample than the serial chain's, and no
residual shows that. So before the first solve of a model, and then ever more rarely, some rows are made together and
alone: other timesteps every time, so that all of them have their turn.

What is left between the two is rounding, which depends on the size of a batch (TF32, bfloat16, the choice of a
convolution). The rounds cannot get below what it does to the sample.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelOutputError
from ..model.knowledge import signature_of, variant_of
from ..model.recording import RecordedModel
from ..nodes.grid import prediction_weight
from ..schedule.cache import cached
from .options import Options
from .system import System

LEVELS = 3  # timesteps in the batch
ALONE = 2  # rows that are made again
LARGEST = {torch.float64: 2e-3, torch.float32: 1e-2}  # relative difference that may be rounding, TF32's included
LARGEST_HALF = 5e-2  # of the other dtypes
SEVERAL = 3.0  # times what rounding does to the sample, typically: what a tolerance must leave to it
MOST_SOLVES = 32  # between two looks
GOLDEN = 0.6180339887498949  # multiples of it spread out evenly

_log = logging.getLogger(__name__)


@dataclass
class RowRecord:
    """What is known of one model, for one kind of conditions."""

    solves: int = 0
    looks: int = 0
    rounding: float = 0.0
    """The largest relative difference that was seen between a row of a batch and the same row alone."""
    told: bool = False

    def due(self) -> bool:
        """Whether the solve that begins is to look: the first, the second, the fourth, and so on."""
        self.solves += 1
        often = min(self.solves, MOST_SOLVES)
        return self.solves % MOST_SOLVES == 0 if often == MOST_SOLVES else self.solves & (self.solves - 1) == 0


def check_rows(system: System, options: Options, noise: Tensor) -> RowRecord:
    """Look, where it is time to.

    Raises:
        ModelOutputError: a row of a batch is not what it is alone, by more than rounding.
    """
    norm = None if options.weight is None else options.weight.key
    key = ("rows", norm, signature_of(noise, system.model_kwargs), variant_of(options.model))
    record: RowRecord = options.knowledge.setdefault(key, RowRecord())
    kept = isinstance(options.model, RecordedModel)  # these rows are on no chain: nothing to learn a draft from
    if not kept and record.due() and system.num_steps > 1:
        with torch.no_grad():
            worst = _difference(system, noise, record.looks)
        record.rounding, record.looks = max(record.rounding, worst), record.looks + 1
    return record


def with_tolerance_in_reach(options: Options, record: RowRecord, dtype: torch.dtype) -> tuple[Options, bool]:
    """The same options, or those with the tolerance that the model's rounding allows; whether it is the one asked for.

    Where it is not, that is said once in the log, and nothing is finished serially.
    """
    schedule, tol = options.schedule, options.allowed(dtype)
    weight: Tensor = cached(schedule, "prediction weight", lambda: prediction_weight(schedule))
    floor = SEVERAL * record.rounding * float(weight.norm())
    if floor <= tol:
        return options, True
    if not record.told:
        record.told = True
        _log.warning(
            "tol = %.1e is out of reach: the model's predictions depend on the size of a batch by %.1e, which moves "
            "the sample by about %.1e; rounds end there. Use a dtype with more digits, or sampler.serial",
            tol, record.rounding, floor,
        )  # fmt: skip
    return replace(options, tol=floor, on_failure="raise" if options.on_failure == "raise" else "warn"), False


def _difference(system: System, noise: Tensor, number: int) -> float:
    """The largest relative difference between rows of a batch and the same rows alone; other ones for every number."""
    steps, batch, schedule = system.num_steps, system.batch, system.schedule
    at = sorted({int((number + k / LEVELS) * (1 if number == 0 else GOLDEN) % 1 * steps) for k in range(LEVELS)})
    at = at if len(at) > 1 else sorted({at[0], (at[0] + steps // 2) % steps, steps - 1})
    step = torch.tensor(
        at[::-1], device=system.device
    )  # from the image's end: a model that reads t[0] reads another one
    sample = (torch.arange(len(at), device=system.device) + number) % batch
    start = noise.detach().reshape(batch, -1)[sample].to(system.dtype)
    level = (schedule.signal[:-1].square() + schedule.sigma[:-1].square()).sqrt()[at[::-1]]
    states = start * (level / schedule.init_noise_sigma).to(start)[:, None]
    try:
        together = _predict(system, states, step, sample)
    except ModelOutputError:  # no prediction at all: the solve says where
        return 0.0
    rows = [len(at) - 1 - k for k in range(min(ALONE, len(at) - 1))]
    worst = 0.0
    for row in rows:
        here = slice(row, row + 1)
        alone = _predict(system, states[here], step[here], sample[here])[0]
        size = max(float(alone.norm()), 1e-4 * float(system.to_basis(states[here]).norm()))
        apart = float((together[row] - alone).norm()) / max(size, 1e-300)
        if apart > LARGEST.get(system.model_dtype, LARGEST_HALF):
            raise ModelOutputError(_message(system, at[::-1][row], at[::-1], apart, int(sample[row])))
        worst = max(worst, apart) if apart == apart else worst  # what is not finite is named by the solve
    return worst


def _predict(system: System, states: Tensor, step: Tensor, sample: Tensor) -> Tensor:
    """(n, D) float32 or float64 predictions, in one call, in coordinates whose L2 norm is that of errors."""
    kwargs: dict[str, Any] = system.expand_kwargs(sample)
    count = len(step)
    size = system.pad(count)  # a compiled model is to see the sizes that it sees anyway
    if size > count:
        more = torch.arange(size, device=step.device) % count
        states, step, kwargs = states[more], step[more], system.expand_kwargs(sample[more])
    system.check_evals += count
    return system.to_basis(system.predict(states.clone(), step, kwargs)[:count])


def _message(system: System, step: int, steps: list[int], apart: float, sample: int) -> str:
    times = system.schedule.timesteps
    levels = ", ".join(f"{float(times[k]):g}" for k in steps)
    return (
        f"the model's rows are not independent: in one batch of timesteps {levels}, its prediction for timestep "
        f"{float(times[step]):g} (sample {sample}) differs by {apart:.1e} (relative) from that of a call on this row "
        "alone. It may read t[0] for all rows, couple rows (batch norm, shared attention: try model.eval()), or change "
        "from call to call (dropout, a cache, a hook that counts). It cannot be sampled in parallel as it is; "
        "sampler.serial() can"
    )
