"""What a sampler knows about its own speed, and the plans that it makes of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..engine.options import DEFAULT_TOL, Options
from ..engine.system import System
from ..engine.workspace import Workspace
from ..model.padding import is_compiled
from ..plan import Plan, RoundEstimate
from . import measure as cost
from .decide import PlannerInputs, decide, predict
from .free_memory import usable_bytes
from .round_model import Expectation

PROBING = 0.03  # of the time spent sampling may go into measuring and planning
REINVESTED = 0.1  # of the time saved against the serial chain may go there too
REFRESH = 16  # solves after which a plan is made anew, whatever happened
SURPRISE = 0.2  # or as soon as a solve takes this much more or less than the plan said
OUTLIER_RATIO = 1.3  # a time that far off must be seen twice
CHECK = 16  # solves by rounds after which one begins with a few serial steps, to time them
CORRECTION_DECAY = (
    0.98  # of a correction is kept at every serial solve, so that what was slow once is tried again some time
)
LEARN = 0.3  # weight of the newest solve in the corrections
BANDWIDTH = 2e10  # bytes a second at which a solver's own work is guessed to go, before a solve was seen
TRAFFIC = 48  # bytes it moves for each element of a state


_LOCK = threading.RLock()  # what is learned is shared between samplers, and so between threads


@dataclass
class WorkloadStats:
    """One kind of request to one sampler: sample shape, batch, dtype, device, kinds of kwargs."""

    batch: int
    numel: int
    device: torch.device
    costs: cost.Costs
    expectation: Expectation
    warm: bool = False
    corrections: dict[int, float] = field(default_factory=dict)
    plan: Plan | None = None
    age: int = 0
    allowance: float = 0.0
    """Seconds that may still be spent on measuring and planning."""
    price: float = 0.0
    """What the next measurement costs at most."""
    slabs: dict[int, int] = field(default_factory=dict)
    """Bytes of a solve's memory by its window."""
    suspect: bool = False
    """The last solve by rounds took quite another time than those before."""
    unchecked: int = 0
    """Solves by rounds since the serial chain was timed."""
    draft: float = 0.0
    """Seconds that a draft takes for a timestep of a round, if there is one, on the mean."""
    exhausted: bool = False
    """No further measurement could change the plan."""


class Planner:
    """Chooses how each solve of a sampler is made. clock: seconds; for tests."""

    def __init__(self, options: Options, clock: Callable[[], float] = time.perf_counter) -> None:
        self.options, self.clock = options, clock
        self._kept = cost.kept_beside(options.model)
        self.padded = is_compiled(options.model)
        self._lock = _LOCK
        schedule, tol = options.schedule, DEFAULT_TOL if options.tol is None else options.tol
        chain = (schedule.num_steps, schedule.name, schedule.stochastic)
        kind = (*chain, tol, options.max_rounds, options.max_batch, options.backend, options.spectrum is None)
        self._kind = (*kind, None if options.draft is None else id(options.draft))
        with self._lock:
            self._expectation: Expectation = self._kept.setdefault(
                ("rounds", *self._kind), Expectation(schedule.num_steps, tol, options.draft is not None)
            )

    def site(self, noise: Tensor, model_kwargs: dict[str, Any] | None, warm: bool = False) -> WorkloadStats:
        """What is known about such a request, by all samplers of the model that work alike."""
        signature = (type(self.options.model), *cost.signature_of(noise, model_kwargs))
        key = (signature, noise.shape[0], warm, *self._kind)
        found: WorkloadStats | None = self._kept.get(key)
        if found is None:
            with self._lock:
                costs = self._kept.setdefault(("costs", signature), cost.Costs())
                new = WorkloadStats(noise.shape[0], noise[:1].numel(), noise.device, costs, self._expectation, warm)
                found = self._kept.setdefault(key, new)
        return found

    def plan(self, site: WorkloadStats, noise: Tensor, model_kwargs: dict[str, Any] | None) -> Plan:
        """The plan for such a request, made anew where what it rests on has changed."""
        with self._lock:
            if site.plan is None or (site.age >= REFRESH and site.allowance >= 0):
                previous = site.plan
                site.plan = decide(self.situation(site, noise, model_kwargs, previous))
                site.age = 0
            return site.plan

    def situation(
        self, site: WorkloadStats, noise: Tensor, model_kwargs: dict[str, Any] | None, previous: Plan | None = None
    ) -> PlannerInputs:
        """All that a decision rests on."""
        step, calls = site.costs.step(site.batch), site.costs.curve()
        limit = self.options.row_limit(noise)
        inside = 0.0 if calls is None else calls.in_pieces(site.batch, calls.best_piece(site.batch, limit))
        outside = 0.0 if step is None else max(step - inside, 0.0)
        steps = self.options.schedule.num_steps
        general = sum(site.corrections.values()) / len(site.corrections) if site.corrections else 1.0
        room: list[float] = []

        def enough_memory(window: int) -> bool:
            if not room:
                room.append(usable_bytes(site.device))
            return any(self._slab(site, noise, model_kwargs, w) <= room[0] for w in (steps, window))

        return PlannerInputs(
            steps=steps,
            batch=site.batch,
            step=step,
            calls=calls,
            expect=lambda window: site.expectation(window, site.batch, site.warm),
            overhead=lambda rows: (
                1.5 * outside + rows * site.numel * TRAFFIC / BANDWIDTH + rows / site.batch * site.draft
            ),
            correction=lambda window: site.corrections.get(window, general),
            fits=enough_memory,
            limit=limit,
            max_rounds=self.options.round_limit(),
            previous=None if previous is None else previous.chosen.window,
        )

    def _slab(self, site: WorkloadStats, noise: Tensor, model_kwargs: dict[str, Any] | None, window: int) -> int:
        """Bytes of the solver's memory for that window."""
        if window not in site.slabs:
            system = self.options.system(noise, model_kwargs)
            site.slabs[window] = Workspace.layout(system, self.options.solver, window, self.options.backend).layout()[1]
        return site.slabs[window]

    def forced(self, site: WorkloadStats, noise: Tensor, model_kwargs: dict[str, Any] | None, window: int) -> Plan:
        """The plan with that window, whatever else is faster."""
        plan = decide(self.situation(site, noise, model_kwargs))
        chosen = next(candidate for candidate in plan.candidates if candidate.window == window)
        return replace(plan, chosen=chosen, reason="it is being tried")

    def forget_plan(self, site: WorkloadStats) -> None:
        """Something was learned: the next plan is made anew."""
        with self._lock:
            site.age = REFRESH

    def record_lead(self, site: WorkloadStats, system: System, noise: Tensor, step: float) -> None:
        """The first steps of an unmeasured chain took so long each; measures one call beside them."""
        rows = min(site.batch, self.options.row_limit(noise) or site.batch)
        call = cost.time_call(system, noise, rows, self.clock)
        if system.draft is not None:
            steps, solver = system.num_steps, self.options.solver
            asked = solver.draft_calls(steps, system.schedule.stochastic) or steps
            site.draft = asked / steps * cost.time_draft(system.draft, noise, self.clock)
        with self._lock:
            site.costs.set_step(site.batch, step)
            site.costs.learn_call(rows, min(call, step))
            site.allowance += PROBING * step * self.options.schedule.num_steps
            self.forget_plan(site)

    def record_serial(self, site: WorkloadStats, steps: int, seconds: float) -> None:
        """That many serial steps took so long."""
        with self._lock:
            site.costs.learn_step(site.batch, seconds / steps)
            site.allowance += PROBING * seconds
            site.corrections = {w: 1 + CORRECTION_DECAY * (c - 1) for w, c in site.corrections.items()}
            self._compare(site, seconds)

    def record_rounds(
        self,
        site: WorkloadStats,
        system: System,
        noise: Tensor,
        seen: RoundEstimate,
        seconds: float,
        window: int,
        sure: bool,
        whole: bool,
    ) -> None:
        """A solve with that window took so many rounds and evaluations, and so long.

        sure: believe it, however different from the last ones it is. whole: it began at the noise.
        """
        with self._lock:
            situation = self.situation(site, noise, system.model_kwargs)
            predicted = predict(situation, window, seen)
            if whole:
                site.expectation.learn(window, site.batch, seen, site.warm)
            saved = 0.0 if situation.step is None else max(situation.step * situation.steps - seconds, 0.0)
            site.allowance += PROBING * seconds + REINVESTED * saved
            if predicted is None or situation.calls is None:
                return
            ratio = min(max(seconds / max(predicted[0], 1e-9), 0.1), 10.0)
            old = site.corrections.get(window, ratio)
            jolted = not 1 / OUTLIER_RATIO < ratio / old < OUTLIER_RATIO
            if jolted and not (sure or site.suspect):
                site.suspect = True  # a hiccup, or the machine is another one now: the next solve looks at both sides
                return
            if jolted:  # it is about batched calls, so all windows felt it
                scaled = {w: min(max(c * ratio / old, 0.1), 10.0) for w, c in site.corrections.items()}
                site.corrections = scaled | {window: ratio}
            else:
                site.corrections[window] = old + LEARN * (ratio - old)
            site.suspect = False
            self._compare(site, seconds)

    def check_due(self, site: WorkloadStats) -> bool:
        """Whether the serial chain, which solves by rounds never see, should be timed again."""
        with self._lock:
            site.unchecked += 1
            return site.suspect or site.unchecked > CHECK

    def record_check(self, site: WorkloadStats, step: float) -> None:
        """Some serial steps at the beginning of a solve took so long each."""
        with self._lock:
            old = site.costs.step(site.batch) or step
            near = 1 / OUTLIER_RATIO < step / old < OUTLIER_RATIO
            site.costs.set_step(site.batch, old + LEARN * (step - old) if near else step)
            site.unchecked = 0
            self.forget_plan(site)

    def _compare(self, site: WorkloadStats, seconds: float) -> None:
        said = None if site.plan is None else site.plan.chosen.seconds
        surprised = said is None or abs(seconds / max(said, 1e-9) - 1) > SURPRISE
        site.age = REFRESH if surprised else site.age + 1
