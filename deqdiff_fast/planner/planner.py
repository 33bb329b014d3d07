"""What a sampler knows about its own speed, and the plans that it makes of it."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .._locks import Lock
from ..engine.node_solve import begins_on_nodes
from ..engine.options import Options
from ..engine.placement import Placement
from ..engine.system import System
from ..engine.workspace import Workspace
from ..model.knowledge import signature_of, variant_of
from ..plan import Plan, RoundEstimate
from .decide import PlannerInputs, candidate, decide, predict
from .free_memory import usable_bytes
from .measure import Clock, Costs, measure, time_call
from .round_model import FULL_ROUNDS, Expectation, average
from .shared_clock import SharedClock
from .workload import Workload, WorkloadStats

PROBING = 0.03  # of the time spent sampling may go into measuring and planning
REINVESTED = 0.1  # of the time saved against the serial chain may go there too
REFRESH = 16  # solves after which a plan is made anew, and, of those by rounds, the serial chain is timed again
OUTLIER_RATIO = 1.25  # a time that far off what was expected makes a new plan; a correction must be measured twice
CORRECTION_DECAY = 0.98  # left of corrections after a serial solve: what was slow once is tried again some time
MOST_CORRECTION = 100.0  # beyond which a time was no solver's; of a model of microseconds it is the least part
MOST_PREPARING = 6  # solves of a kind that may prepare something and are not believed for it
ROUND_OVERHEAD = 1.5  # of what a serial step spends outside of the model: a round also tests and shifts its window
ELEMENT_SECONDS = 2.4e-9  # a solver's own work for an element of a state: 48 bytes at 20 GB a second
SHORT_STEP = 2e-4  # seconds of a step, for a sample, that a prior pays for
DRAFT_STEPS = 8  # timesteps in the call of a draft that is timed, as in a small round
DRAFT_EVALS = 3  # evaluations of a draft for each of the model, by all sweeps of a solve

_log = logging.getLogger(__name__)
_LOCK = Lock()  # what is learned is shared between samplers, and so between threads


class Planner:
    """Chooses how each solve of a sampler is made. clock: seconds, in the place of those that suit; for tests."""

    def __init__(self, options: Options, clock: Clock | None = None) -> None:
        ranks = options.ranks
        self.options, self.clock = options, clock or (None if ranks is None else SharedClock(ranks, options.schedule))
        self._shared = options.knowledge
        schedule, tol = options.schedule, options.requested_tol
        chain = (schedule.num_steps, schedule.name, schedule.stochastic)
        kind = (*chain, tol, options.max_rounds, options.max_batch, options.backend, options.spectrum is None)
        on_nodes = begins_on_nodes(options, schedule.num_steps, warm=False)
        self._tol, self._nodes = tol, options.node_sizes if on_nodes else []
        draft = None if options.draft is None else id(options.draft)
        self._kind = (*kind, *self._nodes, draft, options.shard_states, options.offload)

    def __reduce__(self) -> tuple[Any, ...]:
        clock = None if isinstance(self.clock, SharedClock) else self.clock
        return type(self), (self.options, clock)  # a copy is of another model, which it learns about anew

    def workload(
        self, noise: Tensor, model_kwargs: dict[str, Any] | None, warm: bool = False, trajectory: bool = False
    ) -> Workload:
        """Such a request, with what all samplers of the model that work alike know about it.

        trajectory: all states are asked for, so all timesteps are to be evaluated in the end.
        """
        model = self.options.model
        signature = (type(model), variant_of(model), *signature_of(noise, model_kwargs))
        certify = bool(self._nodes) and not warm and (trajectory or self.options.certify == "full")
        key = (signature, noise.shape[0], warm, certify, *self._kind)
        stats: WorkloadStats | None = self._shared.get(key)
        if stats is None:
            steps, drafted = self.options.schedule.num_steps, self.options.draft is not None
            with _LOCK:
                costs = self._shared.setdefault(("costs", signature), Costs())
                rounds = Expectation(steps, self._tol, drafted, self._nodes, certify)
                rounds = self._shared.setdefault(("rounds", certify, *self._kind), rounds)
                stats = self._shared.setdefault(key, WorkloadStats(costs, rounds))
        return Workload(noise, model_kwargs, warm, stats)

    def system(self, workload: Workload, serial: bool = False) -> System:
        """The chain of a request. Without the prior by the shape of a sample where steps take next to no time: what it
        saves of them is then less than it takes to change rows to its basis and back."""
        stats, step = workload.stats, workload.stats.costs.step(workload.batch)
        if stats.prior is None and step is not None:
            stats.prior = step >= SHORT_STEP * workload.batch
        return self.options.system(workload.noise, workload.model_kwargs, serial, stats.prior is not False)

    def clock_of(self, workload: Workload) -> Clock:
        """What such solves, and all that they are compared with, are timed by."""
        return self.clock or workload.stats.costs.clock

    def on_nodes(self, workload: Workload, window: int) -> bool:
        """Whether a solve with that window begins with rounds on nodes."""
        return begins_on_nodes(self.options, window, workload.warm)

    def full_rounds(self, workload: Workload, piece: int) -> float | None:
        """Seconds of the rounds on all timesteps that follow those on nodes where these do not suffice."""
        inputs = self.inputs(workload)
        if inputs.calls is None:
            return None
        rows = inputs.steps * inputs.batch
        return FULL_ROUNDS * (inputs.calls.in_pieces(rows, piece) + inputs.overhead(rows))

    def plan(self, workload: Workload) -> Plan:
        """The plan for such a request, made anew where what it rests on has changed."""
        stats = workload.stats
        with _LOCK:
            if stats.plan is None or (stats.age >= REFRESH and stats.measure_budget >= 0):
                before, stats.plan, stats.age = stats.plan, decide(self.inputs(workload, stats.plan)), 0
                if stats.plan.measured and (before is None or before.serial != stats.plan.serial):
                    _log.info("%s", stats.plan.summary)
            return stats.plan

    def forced(self, workload: Workload, window: int) -> Plan:
        """The plan with that window, whatever is faster."""
        inputs = self.inputs(workload)
        return replace(decide(inputs), chosen=candidate(inputs, window), reason="it is being tried")

    def inputs(self, workload: Workload, previous: Plan | None = None) -> PlannerInputs:
        """All that a decision rests on."""
        stats, batch, noise, steps = workload.stats, workload.batch, workload.noise, self.options.schedule.num_steps
        usable = usable_bytes(noise.device) if self.options.ranks is None else self.options.ranks.usable
        step, calls, limit = stats.costs.step(batch), stats.costs.curve(), self.options.row_limit(noise)
        inside = 0.0 if calls is None else calls.of_step(batch, limit)
        outside = 0.0 if step is None else max(step - inside, 0.0)
        row = noise[:1].numel() * ELEMENT_SECONDS + stats.draft_seconds / batch
        on_nodes, known = self.on_nodes(workload, steps), stats.corrections

        def correction(window: int) -> float:  # windows are not corrected by rounds on nodes, which are another thing
            return known.get(window >= steps, 1.0 if on_nodes else known.get(window < steps, 1.0))

        return PlannerInputs(
            steps=steps, batch=batch, step=step, calls=calls, limit=limit, max_rounds=self.options.round_limit(),
            expect=lambda window: stats.expectation(window, batch, workload.warm), windows=not self.options.node_only,
            overhead=lambda rows: ROUND_OVERHEAD * outside + rows * row, correction=correction,
            fits=lambda window: self._fits(workload, window, usable), nodes=self._nodes if on_nodes else [],
            previous=None if previous is None else previous.chosen.window,
        )  # fmt: skip

    def _fits(self, workload: Workload, window: int, usable: float) -> bool:
        """Whether the solver's memory for that window, or even for all timesteps, is there."""
        known, options = workload.stats.solver_bytes, self.options
        for size in (options.schedule.num_steps, window):
            if size not in known:
                system = self.system(workload)
                device = host = 0
                if self.on_nodes(workload, size):  # whose memory stays until the rounds that may follow have begun
                    device, host = Placement.of(system, options).bytes(options.solver)
                if not options.node_only:
                    device += Workspace.layout(system, options.solver, size, options.backend).layout()[1]
                known[size] = device, host
            device, host = known[size]
            alone = options.ranks is None  # what others have free of the host was not asked
            if device <= usable and (host == 0 or not alone or host <= usable_bytes(torch.device("cpu"))):
                return True
        return False

    def record_first_steps(self, workload: Workload, system: System, step: float, few: bool = True) -> None:
        """Steps of an unmeasured chain, a few of them or many, took so long each; measures a call, and the draft."""
        stats, noise = workload.stats, workload.noise
        rows = min(workload.batch, self.options.row_limit(noise) or workload.batch)
        clock = self.clock_of(workload)
        call = time_call(system, noise, rows, clock)
        if system.draft is not None:
            rows = DRAFT_STEPS * workload.batch
            call_of_draft = measure(system.draft.model, noise, rows, repeats=1, budget=math.inf, clock=clock)
            stats.draft_seconds = DRAFT_EVALS * call_of_draft / DRAFT_STEPS
        with _LOCK:
            stats.costs.set_step(workload.batch, step, few)
            stats.costs.set_call(rows, min(call, step))
            stats.measure_budget += PROBING * step * system.num_steps
            stats.age = REFRESH

    def record_serial(self, workload: Workload, steps: int, seconds: float) -> None:
        """That many serial steps took so long."""
        stats = workload.stats
        with _LOCK:
            stats.costs.learn_step(workload.batch, seconds / steps, bool(stats.corrections))
            stats.measure_budget += PROBING * seconds
            stats.corrections = {whole: 1 + CORRECTION_DECAY * (c - 1) for whole, c in stats.corrections.items()}
            self._compare(stats, seconds)

    def believes(self, workload: Workload, window: int, prepared: bool) -> bool:
        """Whether to learn from a solve with that window; prepared: it made tables that later ones find made."""
        stats = workload.stats
        first = (window >= self.options.schedule.num_steps) not in stats.corrections
        waits = prepared and first and stats.preparing < MOST_PREPARING
        stats.preparing += waits
        return not waits

    def record_rounds(
        self, workload: Workload, window: int, taken: RoundEstimate, seconds: float, gave_up: bool
    ) -> None:
        """A solve with that window took so many rounds and evaluations, and so long.

        gave_up: it was given up, so its time is believed however surprising it is.
        """
        stats = workload.stats
        with _LOCK:
            inputs = self.inputs(workload)
            predicted, whole = predict(inputs, window, taken), window >= inputs.steps
            stats.expectation.learn(window, workload.batch, taken, workload.warm)
            saved = 0.0 if inputs.step is None else max(inputs.step * inputs.steps - seconds, 0.0)
            stats.measure_budget += PROBING * seconds + REINVESTED * saved
            if predicted is None:
                return
            ratio = _bounded(seconds / max(predicted[0], 1e-9))
            old = stats.corrections.get(whole, ratio)
            outlier = not _alike(ratio, old)
            if outlier and not (gave_up or stats.suspect):
                stats.suspect = True  # a hiccup, or the machine is another one now: the next solve times both sides
                return
            if outlier:  # it is about batched calls, so all solves felt it
                stats.corrections = {w: _bounded(c * ratio / old) for w, c in stats.corrections.items()}
            stats.corrections[whole] = ratio if outlier else average(old, ratio)
            stats.suspect = False
            self._compare(stats, seconds)
            if gave_up or seconds > inputs.steps * (inputs.step or math.inf):
                stats.plan = None  # the next one is made at once, whatever the budget: this costs more

    def check_due(self, workload: Workload) -> bool:
        """Whether the serial chain, which solves by rounds never see, should be timed again."""
        stats = workload.stats
        with _LOCK:
            stats.unchecked += 1
            unlike = bool(stats.corrections) and stats.costs.is_of_few(workload.batch)
            suspect = stats.suspect and stats.unchecked > 1 and stats.measure_budget >= 0  # and not just timed
            return suspect or unlike or stats.unchecked > REFRESH

    def record_check(self, workload: Workload, step: float) -> None:
        """A stretch of serial steps at the beginning of a solve took so long each."""
        stats = workload.stats
        with _LOCK:
            old = stats.costs.step(workload.batch) or step
            stats.costs.set_step(workload.batch, average(old, step) if _alike(step, old) else step)
            stats.unchecked = 0
            stats.age = REFRESH

    def _compare(self, stats: WorkloadStats, seconds: float) -> None:
        predicted = None if stats.plan is None else stats.plan.chosen.seconds
        expected = predicted is not None and _alike(seconds, predicted)
        stats.age = stats.age + 1 if expected else REFRESH


def _alike(new: float, old: float) -> bool:
    return 1 / OUTLIER_RATIO < new / max(old, 1e-9) < OUTLIER_RATIO


def _bounded(ratio: float) -> float:
    return min(max(ratio, 1 / MOST_CORRECTION), MOST_CORRECTION)
