"""What every solve returns, and what a callback sees on the way."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .plan import Plan


@dataclass
class Stats:
    """How a solve went."""

    solver: str
    window: int
    rounds: int = 0
    """Batched model calls, one after the other, on nodes or on the active timesteps."""
    node_rounds: int = 0
    """Those of `rounds` that evaluated nodes only, a few of the timesteps."""
    timesteps_evaluated: float = 1.0
    """At what part of the timesteps the model was asked, in any round, about any sample."""
    error_estimate: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64))
    """(B,): the relative L2 error of each sample against the serial chain, as far as the nodes can tell; after rounds
    on all timesteps the longest relative step of the last round."""
    model_evals: int = 0
    """Model evaluations (NFE): samples x timesteps evaluated, summed over rounds, serial steps included."""
    check_evals: int = 0
    """Those of `model_evals` that only checked the model: whether its rows are independent, and smooth in time."""
    model_calls: int = 0
    """Calls of the model; more than `rounds` where `max_batch` cuts a round into chunks."""
    draft_evals: int = 0
    """Rows that a draft of the model was called on, if there is one; not among `model_evals`."""
    residual_trace: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.float64))
    """(rounds, B): the largest relative residual among the timesteps that were not final before that round; of rounds
    on nodes the estimate of the error, infinite for the first three, which have none."""
    wall_seconds: float = 0.0
    finished_serially: int = 0
    """Chain steps that were made one after the other, by plan or because the rounds had run out; 0 if none."""
    stop_reason: str = "converged"
    """"converged", "max_rounds", "callback", "serial", "replanned": finishing serially turned out to be faster, or
    "rounding": the model's predictions depend on the size of a batch by more than the tolerance allows."""
    repairs: int = 0
    """Rounds in which an iterate overflowed and was rebuilt from its last finite state."""
    plan: Plan | None = None
    """What `solver="auto"` with `window="auto"` had decided, and why; None where the caller decided."""


@dataclass
class Solution:
    """A sample and how far it can be trusted."""

    sample: Tensor
    """(B, *shape), dtype of the noise."""
    converged: Tensor
    """(B,) bool, on the CPU. True also where the chain was finished serially: such a sample is exact."""
    stats: Stats
    trajectory: Tensor | None = None
    """(T + 1, B, *shape), index 0 the noise and T the sample, if it was asked for."""


@dataclass
class RoundInfo:
    """The state of a running solve; valid only during the callback. Return True from the callback to stop."""

    round: int
    max_rounds: int
    num_steps: int
    front: Tensor
    """(B,) int64: how many chain steps are final for each sample; `num_steps` when it is done."""
    residual: Tensor
    """(B,) largest relative residual among the timesteps that were not final; 0 when done. In rounds on nodes the
    estimate of the error, infinite for the first three."""
    tolerance: float
    """The residual at which rounds on all timesteps end."""
    _preview: Callable[[], Tensor] = field(repr=False, default=lambda: torch.empty(0))
    _sample: Callable[[], Tensor] = field(repr=False, default=lambda: torch.empty(0))
    _state: Callable[[int], Tensor] = field(repr=False, default=lambda step: torch.empty(0))
    _denoised: Callable[[int], Tensor] = field(repr=False, default=lambda step: torch.empty(0))

    def preview(self) -> Tensor:
        """(B, *shape): the prediction of the clean sample at the last timestep that was evaluated."""
        return self._preview()

    def sample(self) -> Tensor:
        """(B, *shape): the running last state of the chain."""
        return self._sample()

    def state(self, step: int) -> Tensor:
        """(B, *shape): state number `step` of the chain, 0 the noise and `num_steps` the sample.

        Final for sample b where step <= front[b]. Raises IndexError.
        """
        if not 0 <= step <= self.num_steps:
            raise IndexError(f"step: expected a number from 0 to {self.num_steps}, got {step}")
        return self._state(step)

    def denoised(self, step: int) -> Tensor:
        """(B, *shape): the clean sample that the model predicted at state number `step` when it was last asked.

        Final for sample b where step < front[b]; before the window has reached `step` it means nothing. Raises
        IndexError.
        """
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step: expected a number from 0 to {self.num_steps - 1}, got {step}")
        return self._denoised(step)


Callback = Callable[[RoundInfo], object]


def asks_to_stop(answer: object) -> bool:
    """Whether a callback's answer is True: Python's, or that of numpy or torch. What is no bool asks for nothing.

    Raises:
        ValueError: several bools.
    """
    if str(getattr(answer, "dtype", "")) not in ("bool", "torch.bool"):
        return answer is True
    shape = tuple(getattr(answer, "shape", ()))
    if math.prod(shape) != 1:
        raise ValueError(
            f"callback: expected it to return True to stop, got bools of shape {shape}; use .all() or .any()"
        )
    return bool(answer)
