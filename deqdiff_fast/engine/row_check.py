"""Whether a batched call of the model says of every row what a call on that row alone says.

A parallel solve asks about many timesteps in one call. A model that takes one timestep for all of them (`t[0]`, a
window in `sigma[0]`), whose rows depend on each other (batch norm in training mode, attention across the batch), or
that is another one in every call (dropout, a cache) would end in another sample than the serial chain's, and no
residual shows that. So before the first solve of a model, and then ever more rarely, the rows of some timesteps are
made together and apart: other timesteps every time, so that all of them have their turn.

What is left between the two is rounding, which depends on the size of a batch (TF32, bfloat16, the choice of a
convolution). The rounds cannot get below what it does to the sample.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._types import OnFailure
from ..errors import ModelOutputError
from ..model.knowledge import signature_of, variant_of
from ..model.padding import out_of_memory
from ..model.recording import RecordedModel
from ..model.sample_kwargs import is_guess, with_guesses_shared
from ..nodes.grid import GOLDEN, prediction_weight
from ..schedule.cache import cached
from .options import Options
from .system import System

LEVELS = 3  # timesteps in the batch
ALONE = 2  # of them that are made again
MOST_SAMPLES = 8  # all of which are compared; of larger batches one a timestep
LARGEST = {torch.float64: 2e-3, torch.float32: 1e-2}  # relative difference that may be rounding, TF32's included
LARGEST_HALF = 5e-2  # of the other dtypes
SEVERAL = 3.0  # times what rounding does to the sample, typically: what a tolerance must leave to it
ROUNDED = 15  # rounds after which none gets nearer, where every size of a batch rounds in another way
MOST_SOLVES = 32  # between two looks
APART = 0.9  # times, and negated: the states at a timestep of a look, against those of the one before

_log = logging.getLogger(__name__)


@dataclass
class RowRecord:
    """What is known of one model, for one kind of conditions."""

    solves: int = 0
    looks: int = 0
    next_look: int = 1
    """The solve that is to look."""
    rounding: float = 0.0
    """The largest relative difference that was seen between a row of a batch and the same row alone."""
    told: bool = False
    shared: bool = False  # whether B numbers or strings among the conditions, maybe one a sample, belong to none

    def due(self) -> bool:
        """Whether the solve that begins is to look: the first, the second, the fourth, and so on."""
        self.solves += 1
        if self.solves < self.next_look:
            return False
        self.next_look = self.solves + min(self.solves, MOST_SOLVES)
        return True

    def compare(self, system: System, noise: Tensor) -> None:
        """Compare, at other timesteps every time; raises ModelOutputError."""
        worst = 0.0
        for most in (MOST_SAMPLES, 1):  # where memory is short: the solve itself makes its calls smaller
            try:
                with torch.no_grad():
                    worst = _difference(system, noise, self.looks, most)
                break
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
        self.rounding, self.looks = max(self.rounding, worst), self.looks + 1
        self.next_look = max(2, self.next_look)


def check_rows(system: System, options: Options, noise: Tensor) -> RowRecord:
    """Look, where it is time to. Raises ModelOutputError: a row of a batch is not what it is alone, by more than
    rounding."""
    record = _record(system, options, noise)
    kept = isinstance(options.model, RecordedModel)  # these rows are on no chain: nothing to learn a draft from
    if record.shared:
        system.model_kwargs = with_guesses_shared(system.model_kwargs, system.batch)
    if not kept and record.due() and system.num_steps > 1:
        try:
            record.compare(system, noise)
        except ModelOutputError:
            if not _right_when_shared(record, system, noise):
                raise
    return record


def _right_when_shared(record: RowRecord, system: System, noise: Tensor) -> bool:
    """Whether rows are as in calls of their own once what is only guessed to be per sample is passed as it is, as the
    serial chain passes it; then that is how the system goes on."""
    before = system.model_kwargs
    guessed = [name for name, value in before.items() if is_guess(value, system.batch)]
    if not guessed:
        return False
    system.model_kwargs = with_guesses_shared(before, system.batch)
    try:
        record.compare(system, noise)
    except Exception:  # it may not even take them so: then the first complaint is the one to make
        system.model_kwargs = before
        return False
    record.shared = True
    _log.warning(
        "model_kwargs: %s: not one a sample, for then rows depend on each other; passed on whole. Mark what belongs to "
        "no sample with deqdiff_fast.shared(...)", ", ".join(guessed),
    )  # fmt: skip
    return True


def check_rows_now(options: Options, noise: Tensor, model_kwargs: dict[str, Any], changed: bool) -> None:
    """As `check_rows`, before a solve that may not even be made by rounds, unless that was done before.

    changed: the model is not what it was then.
    """
    if len(noise) == 0:
        return
    system = options.system(noise, model_kwargs, serial=True)
    record = _record(system, options, noise)
    record.looks = 0 if changed else record.looks
    if system.num_steps > 1 and not record.looks:
        record.compare(system, noise)


def _record(system: System, options: Options, noise: Tensor) -> RowRecord:
    norm, times = None if options.weight is None else options.weight.key, options.schedule.timesteps
    chain = (len(times), float(times[0]), float(times[-1]))  # what is on for a range of them alone may be on in another
    key = ("rows", norm, chain, len(noise), signature_of(noise, system.model_kwargs), variant_of(options.model))
    record: RowRecord = options.knowledge.setdefault(key, RowRecord())
    return record


def with_tolerance_in_reach(
    options: Options, record: RowRecord, dtype: torch.dtype, nodes: bool
) -> tuple[Options, bool]:  # fmt: skip
    """The same options, or those with the tolerance that rounding allows; whether it is the one asked for. Where it is
    not, that is said once in the log, nothing is finished serially, and after rounds on `nodes` few others are made."""
    schedule, tol = options.schedule, options.allowed(dtype)
    weight = cached(schedule, "rounding", lambda: float(prediction_weight(schedule).norm()))
    unit = 2 * torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps  # of both chains
    floor, least = SEVERAL * record.rounding * weight, max(options.floor(dtype), unit * weight)
    if max(floor, least) <= (asked := tol if options.tol is None else options.tol):
        return options, True
    if not record.told:
        record.told = True
        sizes = f"the model's predictions depend on the size of a batch by {record.rounding:.1e}, which"
        why = sizes if floor > least else f"the states are {str(dtype).removeprefix('torch.')}, whose rounding"
        _log.warning(
            "tol = %.1e is out of reach: %s moves the sample by about %.1e; rounds end there. "
            "Use a dtype with more digits, or sampler.serial",
            asked, why, max(floor, least),
        )  # fmt: skip
    limit = min(options.round_limit(), ROUNDED) if nodes and floor > least else options.round_limit()
    end: OnFailure = "raise" if options.on_failure == "raise" else "warn"
    return replace(options, tol=max(floor, tol), max_rounds=limit, on_failure=end), False


def _difference(system: System, noise: Tensor, number: int, most: int) -> float:
    """The largest relative difference between rows of a batch of several timesteps and those of a call on one, as the
    serial chain makes it; other timesteps for every number. most: samples of which all are compared."""
    steps, batch = system.num_steps, system.batch
    at = sorted({int((number + k / LEVELS) * (1 if number == 0 else GOLDEN) % 1 * steps) for k in range(LEVELS)})
    at = at if len(at) > 1 else sorted({at[0], (at[0] + steps // 2) % steps, steps - 1})
    at.reverse()  # from the image's end: t[0] is another one's then
    few = batch <= most and len(at) * batch <= (system.max_batch or len(at) * batch)
    levels = [  # no two alike, for rows that look at each other see nothing new in copies of themselves
        _Level.of(system, (-APART) ** k * noise, i, list(range(batch)) if few else [(k + number + 1) % batch])
        for k, i in enumerate(at)
    ]
    try:
        single = [_predict(system, *level) for level in levels[: -ALONE - 1 : -1]]
    except ModelOutputError:  # no prediction at all: the solve says where
        return 0.0
    # in another order at every level: conditions that are merely tiled are not those of these rows
    order = [torch.arange(len(level.sample)).roll(k + number + 1) for k, level in enumerate(levels)]
    rows = [level.select(turn.to(system.device)) for level, turn in zip(levels, order, strict=True)]
    together = _in_one_call(system, rows)
    worst = 0.0
    for k, alone in zip(range(len(at) - 1, -1, -1), single):
        for b, row in enumerate(together.chunk(len(at))[k]):
            one = alone[order[k][b]]
            size = max(float(one.norm()), 1e-4 * float(system.to_basis(rows[k].states[b : b + 1]).norm()))
            apart = float((row - one).norm()) / max(size, 1e-300)
            if apart > LARGEST.get(system.model_dtype, LARGEST_HALF):
                raise ModelOutputError(_message(system, at[k], at, apart, int(rows[k].sample[b])))
            worst = max(worst, apart) if apart == apart else worst  # what is not finite is named by the solve
    return worst


def _in_one_call(system: System, levels: list[_Level]) -> Tensor:
    """(n, D) predictions of several timesteps; raises ModelOutputError where a model does not take them."""
    try:
        return _predict(system, *(torch.cat(parts) for parts in zip(*levels, strict=True)))
    except Exception as error:
        if type(error) not in (RuntimeError, ValueError, TypeError, IndexError) or out_of_memory(error):
            raise  # not torch's or Python's own word for "this is no batch"
        raise ModelOutputError(
            f"the model works on one timestep, but not on one batch of {len(levels)} timesteps x "
            f"{len(levels[0].sample)} samples ({type(error).__name__}: {error}); it cannot be sampled in parallel as "
            "it is; sampler.serial() can"
        ) from error


class _Level(NamedTuple):
    """Rows of one timestep."""

    states: Tensor  # (n, D)
    step: Tensor  # (n,)
    sample: Tensor  # (n,)

    @classmethod
    def of(cls, system: System, noise: Tensor, step: int, samples: Sequence[int]) -> _Level:
        """The noise of those samples, at the level of the timestep."""
        schedule, sample = system.schedule, torch.tensor(samples, device=system.device)
        start = noise.detach().reshape(system.batch, -1)[sample].to(system.dtype)
        level = math.hypot(float(schedule.signal[step]), float(schedule.sigma[step])) / schedule.init_noise_sigma
        return cls(start * level, torch.full_like(sample, step), sample)

    def select(self, rows: Tensor) -> _Level:
        """Those rows."""
        return _Level(*(part[rows] for part in self))


def _predict(system: System, states: Tensor, step: Tensor, sample: Tensor) -> Tensor:
    """(n, D) float32 or float64 predictions, in one call, in coordinates whose L2 norm is that of errors."""
    asked, ranks = len(step), getattr(system.model, "deqdiff_ranks", None)
    if ranks is not None:  # every one of them is to see the whole batch
        states, step, sample = (x.repeat(ranks.size, *[1] * (x.dim() - 1)) for x in (states, step, sample))
    kwargs: dict[str, Any] = system.expand_kwargs(sample)
    count = len(step)
    size = system.pad(count)  # a compiled model is to see the sizes that it sees anyway
    if size > count:
        more = torch.arange(size, device=step.device) % count
        states, step, kwargs = states[more], step[more], system.expand_kwargs(sample[more])
    system.check_evals += count
    return system.to_basis(system.predict(states, step, kwargs)[:asked])


def _message(system: System, step: int, steps: list[int], apart: float, sample: int) -> str:
    times = system.schedule.timesteps
    levels = ", ".join(f"{float(times[k]):g}" for k in steps)
    return (
        f"the model's rows are not independent: in one batch of timesteps {levels}, its prediction for timestep "
        f"{float(times[step]):g} (sample {sample}) differs by {apart:.1e} (relative) from that of a call on this "
        "timestep alone. It may read t[0] or sigma[0] for all rows, keep masks or conditions for one batch, couple "
        "rows (batch norm, shared attention: try model.eval()), or change from call to call (dropout, a cache, a hook "
        "that counts). It cannot be sampled in parallel as it is; sampler.serial() can"
    )
