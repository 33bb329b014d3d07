"""Unrolled: back-propagation through the rounds, everything stored. The reference that the other modes are held to.

The sampler's own rounds work in place and keep nothing, so this mode makes rounds of its own in plain torch, with the
scalar slope and no memory of older rounds, until the residual is below the sampler's tolerance. The gradient is that of
the sample so computed, from its guess on. Its memory grows with rounds x T.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..solution import Solution
from .base import Problem
from .implicit import Implicit
from .rounds import RoundMap, Watch, finish_serially, frozen_noise, start
from .rows import Rows


@dataclass(frozen=True)
class Unrolled:
    """Rounds end as the sampler's do, at its tolerance or `max_rounds` (None: T, where every round is exact)."""

    @property
    def name(self) -> str:
        return "unrolled"

    def attach(self, problem: Problem) -> Solution:
        system, rows, drift = problem.system, Rows(problem.system, problem.system.model_kwargs), frozen_noise(problem)
        f, limit = RoundMap(system, drift), problem.max_rounds or system.num_steps
        noise = problem.noise.flatten(1).to(system.dtype)
        states = start(problem, f, noise)
        with Watch(problem, self.name, limit, exact=system.num_steps) as watch:
            for _ in range(limit):
                predictions = rows.predictions(states[:-1])
                new = f.scan(noise, states, predictions)
                ended = watch(states, new, predictions)
                states = new
                if ended:
                    break
        if watch.failed and problem.on_failure == "serial":
            return Implicit().attach(finish_serially(problem, watch, drift))
        return watch.solution(states[-1], states)
