"""The serial chain as a model's author would write it: no solver memory, no look at the numbers before the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._types import FrozenNoise
from ..model.outputs import output_fault
from ..model.padding import out_of_memory
from ..model.transforms import call
from ..schedule import Schedule
from ..schedule.cache import cached
from .system import System


class Steps(NamedTuple):
    """A schedule's tables as numbers of Python."""

    state_coef: list[list[float]]
    model_coef: list[list[float]]
    noise_coef: list[float]
    draws: list[bool]
    input_scale: list[float]

    @classmethod
    def of(cls, schedule: Schedule) -> Steps:
        """Made once for each schedule."""
        return cached(schedule, "steps", lambda: cls(*(getattr(schedule, name).tolist() for name in cls._fields)))

    def next_state(
        self, i: int, states: Sequence[Tensor], outputs: Sequence[Tensor], noise: Tensor | None,
        out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """x_{i+1} from x_i, x_{i-1}, ... and the outputs there, newest first; noise: times its coefficient already."""
        a, b = self.state_coef[i], self.model_coef[i]
        new = torch.mul(states[0], a[0], out=out).add_(outputs[0], alpha=b[0])
        for lag in range(1, min(len(a), i + 1)):
            new.add_(states[lag], alpha=a[lag]).add_(outputs[lag], alpha=b[lag])
        return new if noise is None else new.add_(noise)


def plain_samples(system: System, noise: Tensor, frozen: FrozenNoise | None) -> Tensor | None:
    """The samples of the chain from `noise`: (B, *shape), one model call a step, all samples in each.

    Args:
        frozen: the chain's noise, None for a deterministic one.

    Returns:
        (B, *shape) in the dtype of the noise, or None where something went wrong that `finish_serially` can name or
        mend: NaN or Inf, an output that is no prediction, or too little memory for all samples at once.
    """
    lags, batch, steps = system.schedule.lags, system.batch, Steps.of(system.schedule)
    times = system.times.repeat_interleave(batch).view(-1, batch)  # one row a call: the model may write to it
    kwargs = system.expand_kwargs(torch.arange(batch, device=system.device))
    draws: Any = iter(()) if frozen is None else iter(frozen.draws)
    states, outputs = [noise.to(system.dtype, copy=True)], list[Tensor]()
    for i in range(system.num_steps):
        x = states[0]
        inputs = x.to(system.model_dtype, copy=True)  # and to this
        if system.input_scale is not None:
            inputs.mul_(steps.input_scale[i])
        try:
            output = call(system.model, inputs, times[i], kwargs)
        except RuntimeError as error:
            if batch == 1 or not out_of_memory(error):
                raise
            return None
        system.model_calls, system.model_evals = system.model_calls + 1, system.model_evals + batch
        if output_fault(output, tuple(noise.shape), system.device):
            return None
        if system.clip_gain is not None:
            output = system.clip(output.flatten(1), x.flatten(1), torch.full((batch,), i, device=x.device)).view_as(x)
        outputs = [output.to(system.dtype), *outputs[: lags - 1]]
        drift = next(draws).to(x.dtype, copy=True).mul_(steps.noise_coef[i]) if steps.draws[i] and frozen else None
        states = [steps.next_state(i, states, outputs, drift), *states[: lags - 1]]
    return states[0].to(noise.dtype) if bool(states[0].isfinite().all()) else None
