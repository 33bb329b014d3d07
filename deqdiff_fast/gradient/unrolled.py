"""Unrolled: back-propagation through the rounds, everything stored. The reference that the other modes are held to.

The sampler's own rounds work in place and keep nothing, so this mode makes rounds of its own in plain torch, with the
scalar slope and no memory of older rounds, until the residual is below the sampler's tolerance.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..solution import Solution
from .base import Problem
from .batched_vjp import BatchedVJP
from .fixed_point_map import FixedPointMap
from .monitor import IterationMonitor


@dataclass(frozen=True)
class Unrolled:
    """Back-propagation through all rounds of a plain-torch iteration: memory grows with rounds x T.

    The gradient is that of the sample so computed, from its initial guess on. Rounds end as the sampler's do, at its
    tolerance or `max_rounds` (None: T, where every round is exact).
    """

    @property
    def name(self) -> str:
        return "unrolled"

    def attach(self, problem: Problem) -> Solution:
        """Run the iteration under autograd. See `Gradient.attach`."""
        system, vjp, f = problem.system, BatchedVJP(problem.system, problem.system.model_kwargs), FixedPointMap(problem)
        limit = problem.max_rounds or system.num_steps
        noise = problem.noise.flatten(1).to(system.dtype)
        states = f.initial_states(noise)
        monitor = IterationMonitor(problem, self.name, limit, exact=system.num_steps)
        with monitor.bar:
            for _ in range(limit):
                predictions = vjp.predictions(states[:-1])
                new = f.scan(noise, states, predictions)
                ended = monitor.update(states, new, predictions)
                states = new
                if ended:
                    break
        return monitor.conclude(states[-1], states, f.drift)
