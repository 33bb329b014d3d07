"""The serial chain as a model's author would write it: no solver memory, no look at the numbers before the end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._types import FrozenNoise
from ..model.guidance import Guided
from ..model.outputs import output_fault
from ..model.padding import out_of_memory
from ..model.transforms import call
from ..schedule import Schedule
from ..schedule.cache import cached
from .system import System
from .workspace import Workspace


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


class PlainChain:
    """The chain from `noise`, one model call a step, all samples in each. The host waits for no step.

    Args:
        noise: (B, *shape).
        frozen: the chain's noise, None for a deterministic one.
        keep: whether the steps are to be taken over by a solve, see `hand_over`.

    Attributes:
        front: steps made so far.
        frozen: as given.
    """

    def __init__(self, system: System, noise: Tensor, frozen: FrozenNoise | None, keep: bool = False) -> None:
        schedule, batch = system.schedule, system.batch
        self.system, self.steps, self.frozen, self.front = system, Steps.of(schedule), frozen, 0
        # of every call a row of its own: the model may write to it
        self._times = system.times[:, None].expand(-1, batch).clone(memory_format=torch.contiguous_format).unbind(0)
        if isinstance(system.model, Guided):  # whose arguments have a row for every sample already
            self._kwargs = system.model.joined(**system.model_kwargs)
        else:
            self._kwargs = system.expand_kwargs(torch.arange(batch, device=system.device))
        self._draws = iter(()) if frozen is None else iter(frozen.draws)
        self._shape, self._dtype = tuple(noise.shape), noise.dtype
        self.states, self.outputs = [noise.detach().to(system.dtype, copy=True)], list[Tensor]()
        self.keep(system.num_steps + 1 if keep else schedule.lags)

    def advance(self, until: int) -> bool:
        """Make the steps up to state `until`. False where something went wrong that `finish_serially` can name or mend:
        an output that is no prediction, or too little memory for all samples at once."""
        system, steps = self.system, self.steps
        for i in range(self.front, until):
            x = self.states[0]
            new = x * steps.state_coef[i][0] if self._once else None
            inputs = x if self._once and x.dtype == system.model_dtype else x.to(system.model_dtype, copy=True)
            if system.input_scale is not None:
                inputs.mul_(steps.input_scale[i])
            kwargs = self._kwargs_at(i) if system.told_steps else self._kwargs
            try:
                output = call(system.model, inputs, self._times[i], kwargs)
            except Exception as error:
                if (system.batch > 1 and out_of_memory(error)) or not self.finite():  # what it says may be about NaN
                    return False
                raise
            system.model_calls, system.model_evals = system.model_calls + 1, system.model_evals + system.batch
            if output_fault(output, self._shape, system.device):
                return False
            output = output.to(x.dtype, copy=self._kept > 1)  # the model may write its next output over this one
            drift = next(self._draws).to(x.dtype) * steps.noise_coef[i] if self.frozen and steps.draws[i] else None
            if new is None:
                self._remember(i, x, output, drift)
                continue
            new.add_(output, alpha=steps.model_coef[i][0])
            self.states = [new if drift is None else new.add_(drift)]
        self.front = until
        return True

    def _kwargs_at(self, i: int) -> dict[str, Any]:
        """Of the call at step i, of a model that is told steps."""
        return {**self._kwargs, "step": torch.full((self.system.batch,), i, device=self.system.device)}

    def _remember(self, i: int, x: Tensor, output: Tensor, drift: Tensor | None) -> None:
        """The step from x_i, whose state and output later ones look at."""
        system, flat = self.system, x.flatten(1)
        if system.clip_gain is not None:
            output = system.clip(output.flatten(1), flat, torch.full((len(x),), i, device=x.device)).view_as(x)
        self.outputs = [output, *self.outputs[: self._kept - 1]]
        self.states = [self.steps.next_state(i, self.states, self.outputs, drift), *self.states[: self._kept - 1]]

    def hand_over(self, work: Workspace) -> None:
        """The steps made so far, into a workspace that was begun with the same noise."""
        chain, done = work.chain, self.front
        for kept, there in ((self.states[done - 1 :: -1], chain.states[1:]), (self.outputs[::-1], chain.predictions)):
            rows = torch.stack(kept).flatten(0, 1).flatten(1)
            there[:done].copy_(self.system.to_basis(rows).view_as(there[:done]))

    def keep(self, newest: int) -> None:
        """Hold on to that many states from now on."""
        self._kept, self.states, self.outputs = newest, self.states[:newest], self.outputs[: newest - 1]
        # where neither a later step nor clipping looks at a state again, it is not copied for the model to write to
        self._once = newest == 1 and self.system.clip_gain is None

    def finite(self) -> bool:
        """Whether the last state is; not, where it is of such a size that its sum is not."""
        return math.isfinite(self.states[0].sum().item())

    def sample(self) -> Tensor | None:
        """The last state, (B, *shape) in the dtype of the noise; None where it is NaN or Inf."""
        return self.states[0].to(self._dtype) if self.finite() else None
