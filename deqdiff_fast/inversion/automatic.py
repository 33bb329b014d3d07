"""Whichever exact method is faster here: rounds of many rows, or one step after the other with few."""

from __future__ import annotations

import math
import threading
import time
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from ..planner import measure as cost
from ..planner.cost_curve import Curve
from .base import Outcome, Task
from .equilibrium import Equilibrium
from .fixed_point import FixedPoint
from .measure import frozen, reconstruct, select

# What a method takes where it was never seen, from inversions of CIFAR-10 images with the bundled model.
CALLS_PER_DIGIT = 1.4  # of the fixed point, in each step
ROUNDS, EVALUATIONS = 35.0, 9.0  # of the equilibrium at a tolerance of 1e-3: model calls; evaluations per timestep
PER_DIGIT = 1.25  # times as many for one more digit
TRUSTED_TOL = 1e-3
NEWEST = 0.5  # weight of the newest inversion in what is remembered

_LOCK = threading.Lock()


class RoundEstimate(NamedTuple):
    """What one inversion takes: model calls that wait for each other, and evaluations per image."""

    rounds: float
    evaluations: float


@dataclass
class Record:
    """What was seen of one kind of request: effort, and seconds over the seconds predicted for it."""

    effort: dict[str, RoundEstimate] = field(default_factory=dict)
    correction: dict[str, float] = field(default_factory=dict)

    def learn(self, name: str, effort: RoundEstimate, ratio: float) -> None:
        """ratio: seconds that it took over what its own effort costs in model calls."""
        with _LOCK:
            old, before = self.effort.get(name, effort), self.correction.get(name, ratio)
            self.effort[name] = RoundEstimate(*(a + NEWEST * (b - a) for a, b in zip(old, effort, strict=True)))
            self.correction[name] = before + NEWEST * (ratio - before)


@dataclass(frozen=True)
class Automatic:
    """Equilibrium inversion or the serial fixed point, whichever is predicted to take fewer seconds.

    The prediction is the model calls that a method makes one after the other, times what a call of so many rows costs
    (measured with the model itself, as for `DEQSampler`), corrected by the inversions that were seen: later ones of the
    same kind know better than the first. Samples that the fixed point does not bring to the tolerance, where its
    iteration diverges, go on to the equilibrium. What was chosen and why is in `stats.notes`.

    equilibrium, fixed_point: the methods, with their settings.
    """

    equilibrium: Equilibrium = field(default_factory=Equilibrium)
    fixed_point: FixedPoint = field(default_factory=FixedPoint)

    name = "auto"
    exact = True

    def solve(self, task: Task) -> Outcome:
        if task.init is not None or task.schedule.lags > 1:  # a start, or coupled steps: for all steps at once
            return self.equilibrium.solve(task)
        seconds, record, calls, probes = self._predict(task)
        chosen = min(seconds, key=lambda name: seconds[name])
        other = next(name for name in seconds if name != chosen)
        began = time.perf_counter()
        outcome = self.equilibrium.solve(task) if chosen == "equilibrium" else self._walk(task)
        taken = time.perf_counter() - began
        stats = outcome.stats
        if stats.stop_reason != "callback":
            seen = RoundEstimate(stats.rounds, stats.model_evals / task.batch)
            record.learn(chosen, seen, taken / max(in_calls(seen, task.batch, calls, task.max_batch), 1e-9))
        stats.model_evals += probes
        stats.notes.insert(
            0, f"{chosen}: {seconds[chosen]:.3g} s predicted, {other} {seconds[other]:.3g} s; it took {taken:.3g} s"
        )
        return outcome

    def _walk(self, task: Task) -> Outcome:
        """One step after the other, and the equilibrium for the samples that this does not bring to the tolerance."""
        outcome = self.fixed_point.solve(task)
        stats, missed, steps = outcome.stats, (~outcome.converged).nonzero().flatten(), task.schedule.num_steps
        left = None if task.max_rounds is None else task.max_rounds - stats.rounds - steps
        if len(missed) == 0 or stats.stop_reason == "callback" or (left is not None and left < 1):
            return outcome
        part = select(frozen(task), missed)  # a step that did not hold may still not matter to the image
        _, error, count = reconstruct(part, outcome.noise[missed.to(outcome.noise.device)])
        stats.model_evals, stats.model_calls = stats.model_evals + count, stats.model_calls + steps
        stats.rounds += steps
        outcome.converged[missed] = error <= task.tol
        missed = missed[error > task.tol]
        if len(missed) == 0:
            return outcome
        again = self.equilibrium.solve(replace(select(frozen(task), missed), max_rounds=left))
        at = missed.to(outcome.noise.device)
        outcome.noise[at], outcome.converged[missed] = again.noise, again.converged
        if outcome.trajectory is not None and again.trajectory is not None:
            outcome.trajectory[:, at] = again.trajectory
        stats.notes.append(f"{len(missed)} of {task.batch} samples went on to the equilibrium")
        stats.add(again.stats)
        stats.stop_reason = again.stats.stop_reason
        return outcome

    def _predict(self, task: Task) -> tuple[dict[str, float], Record, Curve, int]:
        """Seconds of each method, what they were predicted from, what calls cost, and evaluations to measure that."""
        kept, signature = cost.shared_with_model(task.model), cost.signature_of(task.image, task.model_kwargs)
        kind = (task.batch, task.schedule.num_steps, task.schedule.name, task.schedule.stochastic, task.tol)
        with _LOCK:
            record: Record = kept.setdefault(("inversion", signature, *kind, self), Record())
            costs: cost.Costs = kept.setdefault(("costs", (type(task.model), *signature)), cost.Costs())
        efforts = {name: record.effort.get(name, prior) for name, prior in expected(task).items()}
        wide = efforts["equilibrium"].evaluations * task.batch / efforts["equilibrium"].rounds
        calls, probes = measured(task, costs, max(round(wide), task.batch + 1))
        seconds = {
            name: in_calls(effort, task.batch, calls, task.max_batch) * record.correction.get(name, 1.0)
            for name, effort in efforts.items()
        }
        return seconds, record, calls, probes


def expected(task: Task) -> dict[str, RoundEstimate]:
    """What each method takes where nothing was seen."""
    steps = task.schedule.num_steps
    digits = max(-math.log10(task.tol), 1.0) + 1.5  # a step is held tighter than the image
    more = PER_DIGIT ** (math.log10(TRUSTED_TOL / task.tol))
    walk = CALLS_PER_DIGIT * digits * steps
    return {
        "equilibrium": RoundEstimate(ROUNDS * more, EVALUATIONS * more * steps),
        "fixed_point": RoundEstimate(walk, walk),
    }


def in_calls(effort: RoundEstimate, batch: int, calls: Curve, limit: int | None) -> float:
    """Seconds of that many calls of equal size that have so many evaluations together."""
    rows = max(effort.evaluations * batch / max(effort.rounds, 1.0), 1.0)
    return effort.rounds * calls.in_pieces(rows, calls.best_piece(math.ceil(rows), limit))


def measured(task: Task, costs: cost.Costs, rows: int) -> tuple[Curve, int]:
    """What calls cost, by calls of one row per image and of `rows` rows, where such were not measured yet; and the
    evaluations that this took."""
    known, probes = costs.curve(), 0
    limit = min(rows, task.max_batch or rows)
    wanted = [n for n in {min(task.batch, limit), limit} if known is None or not near(n, known.sizes)]
    if wanted:
        system = task.system()
        for n in sorted(wanted):
            costs.set_call(n, cost.measure(system, task.image.detach(), n, repeats=1, budget=0.1))
        probes = system.model_evals
    found = costs.curve()
    assert found is not None
    return found, probes


def near(rows: int, sizes: list[int]) -> bool:
    """Whether a size like that is known already."""
    return any(2 / 3 <= rows / size <= 3 / 2 for size in sizes)
