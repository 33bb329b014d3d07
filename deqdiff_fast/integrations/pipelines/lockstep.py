"""The scheduler itself, one step for each state that is handed out.

Callbacks read its `step_index`, call its `add_noise`, and draw from the generators that it draws from: all of them are
where the plain loop would have them. Where the loop goes on serially, the scheduler is ready for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .problem import DenoisingProblem

_NO_EFFECT = 1e-9  # of a model output's coefficient: the output cannot be read off the next state


class Lockstep:
    """Steps `scheduler` along solved states (T + 1, B, *shape) with the model outputs that these states contain."""

    def __init__(self, scheduler: Any, problem: DenoisingProblem, states: Tensor, noises: list[Tensor | None]) -> None:
        self.scheduler, self.problem, self.states, self.noises = scheduler, problem, states, noises
        self.outputs: list[Tensor] = []
        self.known: dict[int, Tensor] = {}  # those of steps whose next state does not contain them

    def advance(self, timestep: Any, sample: Tensor, step_kwargs: dict[str, Any]) -> Any:
        """The next step; arguments and result as of the scheduler's own."""
        index = len(self.outputs)
        output = self.known[index] if index in self.known else self._output(index)
        self.outputs.append(output)
        whole = torch.cat([output.to(self.problem.first.output.dtype)] * self.problem.halves)
        return self.scheduler.step(whole, timestep, sample, **step_kwargs)

    def _output(self, i: int) -> Tensor:
        """o_i from the recursion, solved for it; from the model where it does not enter x_{i+1}."""
        schedule = self.problem.schedule
        own = float(schedule.model_coef[i, 0])
        if abs(own) <= _NO_EFFECT * float(schedule.state_coef[i].abs().max()):
            return self.problem.output(self.states[i], i)
        dtype = torch.float64 if self.states.dtype == torch.float64 else torch.float32
        rest = self.states[i + 1].to(dtype, copy=True)
        for lag in range(min(schedule.lags, i + 1)):
            rest -= float(schedule.state_coef[i, lag]) * self.states[i - lag].to(dtype)
            if lag:
                rest -= float(schedule.model_coef[i, lag]) * self.outputs[i - lag]
        noise = self.noises[i]
        if noise is not None:
            rest -= float(schedule.noise_coef[i]) * noise[: len(rest)].to(dtype)
        return rest / own
