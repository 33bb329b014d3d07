"""One kind of request, and what is known about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..plan import Plan
from .measure import Costs
from .round_model import Expectation


@dataclass
class WorkloadStats:
    """What is known about one kind of request to one sampler: sample shape, batch, dtype, device, kinds of kwargs.

    costs: shared with other batches and schedules. age: solves since the plan was made, REFRESH where something was
    learned since. corrections: measured over predicted seconds of solves of all timesteps (True) and of a window
    (False). measure_budget: seconds that may still be spent on measuring and planning. probe_cost: what the next
    measurement takes at most; infinite where none helps. solver_bytes: memory of a solve, by its window. draft_seconds:
    of a draft, if there is one, for a timestep of a round, on the mean. suspect: whether the last solve by rounds took
    quite another time than those before. unchecked: solves by rounds since the serial chain was timed. preparing: those
    that were not believed. prior: whether solves use that by the shape of a sample, None where it is not known yet.
    """

    costs: Costs
    expectation: Expectation
    plan: Plan | None = None
    age: int = 0
    corrections: dict[bool, float] = field(default_factory=dict)
    measure_budget: float = 0.0
    probe_cost: float = 0.0
    solver_bytes: dict[int, tuple[int, int]] = field(default_factory=dict)
    draft_seconds: float = 0.0
    suspect: bool = False
    unchecked: int = 0
    preparing: int = 0
    prior: bool | None = None


@dataclass(frozen=True)
class Workload:
    """One request, and what is known about its kind. warm: it starts from a trajectory given by the caller."""

    noise: Tensor
    model_kwargs: dict[str, Any] | None
    warm: bool
    stats: WorkloadStats

    @property
    def batch(self) -> int:
        """B."""
        return self.noise.shape[0]
