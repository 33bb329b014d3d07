"""The serial chain, from any front: the ordinary sampler, the fallback when rounds run out, and the ground truth."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .._types import Rows
from ..errors import NonFiniteError
from .plain_chain import Steps
from .system import SANE_RMS
from .workspace import Workspace

CHECKED_STEPS = 16  # after which NaN and Inf are looked for where the host need not wait

Report = Callable[[int, "list[int]", Tensor], object]


def finish_serially(
    work: Workspace, front: list[int], round: int, report: Report | None, until: int | None = None
) -> tuple[int, bool]:
    """Take every sample b from state front[b] to the end (or to state `until`), one model call a step; `front` is
    moved along.

    The host waits for no step, unless a callback looks at each: NaN and Inf are looked for now and then on the CPU, on
    a device at the end, and then located. Returns the number of steps made and whether `report` asked to stop. Raises
    NonFiniteError, ModelOutputError.
    """
    chain, begun, made, last = work.chain, min(front), 0, work.system.num_steps if until is None else until
    looked_at = getattr(report, "callback", None) is not None
    every = 1 if looked_at else CHECKED_STEPS if work.system.device.type == "cpu" else last
    samples, rows, nothing = list[int](), None, torch.zeros(chain.batch)
    try:
        for i in range(begun, last):
            now = [b for b, final in enumerate(front) if final == i]
            if now != samples:  # those that are further on join in
                samples, rows = now, None
                if len(now) < chain.batch:
                    rows = torch.tensor(now).to(work.system.device)
            _step(work, i, rows, len(now), round + made + 1)
            made += 1
            for b in now:
                front[b] = i + 1
            if made % every == 0:
                _check(work, i + 1 - every, i + 1, round + made)
            if report is not None and report(round + made, front, nothing) is True:
                return made, True
    except Exception as error:
        if not isinstance(error, NonFiniteError):  # it may be about the NaN that came before
            _check(work, begun, begun + made, round + made, error)
        raise
    _check(work, last - made % every, last, round + made)
    return made, False


def _step(work: Workspace, i: int, rows: Tensor | None, count: int, round: int) -> None:
    """State i + 1 of the samples of which it is the next one: (count,) indices, or None for all."""
    chain = work.chain
    flat = None if rows is None else rows + i * chain.batch
    work.evaluate(Rows(flat, i, i + 1, count), round)
    chain.lo.fill_(i), chain.hi.fill_(i + 1)
    at, out = (slice(None), chain.states[i + 1]) if rows is None else (rows, None)
    back = range(i, max(i - work.system.schedule.lags, -1), -1)
    states, outputs = [chain.states[k, at] for k in back], [chain.predictions[k, at] for k in back]
    drift = None if chain.drift is None else chain.drift[i, at]
    new = Steps.of(work.system.schedule).next_state(i, states, outputs, drift, out)
    if rows is not None:
        chain.states[i + 1, rows] = new


def _check(work: Workspace, start: int, stop: int, round: int, cause: Exception | None = None) -> None:
    """Raises NonFiniteError for the first of steps [start, stop) that came to NaN or Inf. round: of the last one."""
    new = work.chain.states[start + 1 : stop + 1]
    if start < stop and not bool(new.sum(2).isfinite().all()):
        for i, states in enumerate(new, start):
            finite = states.isfinite().all(1)
            if not bool(finite.all()):
                raise _error(work, i, int((~finite).int().argmax()), round - (stop - 1 - i)) from cause


def non_finite(work: Workspace, step: int, sample: int, round: int) -> NonFiniteError | None:
    """The error for a row whose step is NaN or Inf, or None where the iterate alone is to blame.

    At the front the input is the chain's own state, so the serial chain would fail as well. Further on a wild iterate
    may have driven a sound model out of its range: only a failure on an input of ordinary size is the model's.
    """
    chain = work.chain
    if step == int(chain.lo[sample]):
        return _error(work, step, sample, round)
    bound = float(chain.sq_norm[step - 1, sample].sqrt() + chain.sq_diff[step - 1, sample].sqrt())
    broken = not bool(chain.predictions[step, sample].isfinite().all())
    if broken and bound <= SANE_RMS * work.system.numel**0.5:
        return _error(work, step, sample, round)
    return None


def _error(work: Workspace, step: int, sample: int, round: int) -> NonFiniteError:
    broken = not bool(work.chain.predictions[step, sample].isfinite().all())
    what = "the model returned NaN or Inf" if broken else "the chain overflowed"
    timestep = float(work.system.times[step])
    return NonFiniteError.at_step(
        what, step=step, num_steps=work.system.num_steps, timestep=timestep, round=round, sample=sample
    )
