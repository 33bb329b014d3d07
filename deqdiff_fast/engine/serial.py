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

Report = Callable[[int, "list[int]", Tensor], object]


def finish_serially(
    work: Workspace, front: list[int], round: int, report: Report | None, until: int | None = None
) -> tuple[int, bool]:
    """Take every sample b from state front[b] to the end (or to state `until`), one model call a step; `front` is
    moved along.

    Returns the number of steps made and whether `report` asked to stop. Raises NonFiniteError, ModelOutputError.
    """
    chain, steps, made = work.chain, work.chain.num_steps, 0
    table = Steps.of(work.system.schedule)
    for i in range(min(front), steps if until is None else until):
        samples = [b for b, final in enumerate(front) if final == i]
        together = len(samples) == chain.batch
        flat = None if together else torch.tensor([i * chain.batch + b for b in samples])
        work.evaluate(Rows(flat, i, i + 1, len(samples)), round + made + 1)
        made += 1
        chain.lo.fill_(i), chain.hi.fill_(i + 1)
        back = range(i, max(i - work.system.schedule.lags, -1), -1)
        rows, out = (slice(None), chain.states[i + 1]) if together else (samples, None)
        states, outputs = [chain.states[k, rows] for k in back], [chain.predictions[k, rows] for k in back]
        new = table.next_state(i, states, outputs, None if chain.drift is None else chain.drift[i, rows], out)
        if not bool(new.sum(1).isfinite().all()):
            finite = new.isfinite().all(1)
            if not bool(finite.all()):
                raise _error(work, i, samples[int((~finite).int().argmax())], round + made)
        if not together:
            chain.states[i + 1, rows] = new
        for b in samples:
            front[b] = i + 1
        if report is not None and report(round + made, front, torch.zeros(chain.batch)) is True:
            return made, True
    return made, False


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
