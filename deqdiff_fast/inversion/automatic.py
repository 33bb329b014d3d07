"""Whichever exact method is faster here: rounds of many rows, or one step after the other with few."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from .._locks import Lock
from ..model.knowledge import shared_with_model, signature_of, variant_of
from ..planner import measure as cost
from ..planner.cost_curve import Curve
from ..planner.shared_clock import SharedClock
from .base import InversionProblem, MethodResult
from .equilibrium import Equilibrium
from .fixed_point import FixedPoint
from .verification import reconstruct

# What a method takes where it was never seen, from inversions of CIFAR-10 images with the bundled model.
CALLS_PER_DIGIT = 1.4  # of the fixed point, in each step
ROUNDS, EVALUATIONS = 35.0, 9.0  # of the equilibrium at a tolerance of 1e-3: model calls; evaluations per timestep
PER_DIGIT = 1.25  # times as many for one more digit
TRUSTED_TOL = 1e-3
NEWEST = 0.5  # weight of the newest inversion in what is remembered

_LOCK = Lock()


class InversionWork(NamedTuple):
    """What one inversion takes: model calls that wait for each other, and evaluations per image."""

    rounds: float
    evaluations: float


@dataclass
class InversionHistory:
    """What was seen of one kind of request, by method: its work, and seconds over the seconds predicted for it."""

    work: dict[str, InversionWork] = field(default_factory=dict)
    correction: dict[str, float] = field(default_factory=dict)

    def record(self, name: str, work: InversionWork, ratio: float) -> None:
        """ratio: seconds that it took over what its own work costs in model calls."""
        with _LOCK:
            old, before = self.work.get(name, work), self.correction.get(name, ratio)
            self.work[name] = InversionWork(*(a + NEWEST * (b - a) for a, b in zip(old, work, strict=True)))
            self.correction[name] = before + NEWEST * (ratio - before)


@dataclass(frozen=True)
class Automatic:
    """Equilibrium inversion or the serial fixed point, whichever is predicted to take fewer seconds.

    The prediction is the model calls that a method makes one after the other, times what a call of so many rows costs
    (measured with the model itself, as for `DEQSampler`), corrected by the inversions that were seen: later ones of the
    same kind know better than the first. Samples that the fixed point does not bring to the tolerance, where its
    iteration diverges, go on to the equilibrium. What was chosen and why is in `stats.notes`.

    Args:
        equilibrium, fixed_point: the methods, with their settings.
    """

    equilibrium: Equilibrium = field(default_factory=Equilibrium)
    fixed_point: FixedPoint = field(default_factory=FixedPoint)

    name = "auto"
    exact = True

    def solve(self, problem: InversionProblem) -> MethodResult:
        """Find the noise, see `Method.solve`."""
        if problem.init_trajectory is not None or problem.schedule.lags > 1:
            return self.equilibrium.solve(problem)  # a start, or coupled steps: for all steps at once
        seconds, history, calls, probes = self._predict(problem)
        chosen = min(seconds, key=lambda name: seconds[name])
        other = next(name for name in seconds if name != chosen)
        clock = clock_of(problem)
        start_time = clock()
        result = self.equilibrium.solve(problem) if chosen == "equilibrium" else self._fixed_point_first(problem)
        taken = clock() - start_time
        stats = result.stats
        if stats.stop_reason != "callback":
            work = InversionWork(stats.rounds, stats.model_evals / problem.batch)
            ideal = seconds_of_calls(work, problem.batch, calls, problem.max_batch)
            history.record(chosen, work, taken / max(ideal, 1e-9))
        stats.model_evals += probes
        stats.notes.insert(
            0, f"{chosen}: {seconds[chosen]:.3g} s predicted, {other} {seconds[other]:.3g} s; it took {taken:.3g} s"
        )
        return result

    def _fixed_point_first(self, problem: InversionProblem) -> MethodResult:
        """One step after the other, and the equilibrium for the samples that this does not bring to the tolerance."""
        result = self.fixed_point.solve(problem)
        stats, missed, steps = result.stats, (~result.converged).nonzero().flatten(), problem.schedule.num_steps
        left = None if problem.max_rounds is None else problem.max_rounds - stats.rounds - steps
        if len(missed) == 0 or stats.stop_reason == "callback" or (left is not None and left < 1):
            return result
        frozen, device = problem.with_frozen_noise(), result.noise.device
        # a step that is not within its tolerance may still not matter to the image
        _, error, count = reconstruct(frozen.select(missed), result.noise[missed.to(device)])
        stats.model_evals, stats.model_calls = stats.model_evals + count, stats.model_calls + steps
        stats.rounds += steps
        result.converged[missed] = error <= problem.tol
        missed = missed[error > problem.tol]
        if len(missed) == 0:
            return result
        again = self.equilibrium.solve(replace(frozen.select(missed), max_rounds=left))
        at = missed.to(device)
        result.noise[at], result.converged[missed] = again.noise, again.converged
        if result.trajectory is not None and again.trajectory is not None:
            result.trajectory[:, at] = again.trajectory
        stats.notes.append(f"{len(missed)} of {problem.batch} samples went on to the equilibrium")
        stats.add(again.stats)
        stats.stop_reason = again.stats.stop_reason
        return result

    def _predict(self, problem: InversionProblem) -> tuple[dict[str, float], InversionHistory, Curve, int]:
        """Seconds of each method, what they were predicted from, what calls cost, and evaluations to measure that."""
        shared, signature = shared_with_model(problem.model), signature_of(problem.image, problem.model_kwargs)
        cache = {} if shared is None else shared
        schedule = problem.schedule
        kind = (problem.batch, schedule.num_steps, schedule.name, schedule.stochastic, problem.tol)
        with _LOCK:
            history: InversionHistory = cache.setdefault(("inversion", signature, *kind, self), InversionHistory())
            kinds = (type(problem.model), variant_of(problem.model), *signature)
            costs: cost.Costs = cache.setdefault(("costs", kinds), cost.Costs())
        works = {name: history.work.get(name, prior) for name, prior in typical_work(problem).items()}
        wide = works["equilibrium"].evaluations * problem.batch / works["equilibrium"].rounds
        calls, probes = measure_calls(problem, costs, max(round(wide), problem.batch + 1))
        seconds = {
            name: seconds_of_calls(work, problem.batch, calls, problem.max_batch) * history.correction.get(name, 1.0)
            for name, work in works.items()
        }
        return seconds, history, calls, probes


def clock_of(problem: InversionProblem) -> cost.Clock:
    """Seconds; the same on all ranks, where there are several."""
    ranks = getattr(problem.model, "deqdiff_ranks", None)
    return time.perf_counter if ranks is None else SharedClock(ranks)


def typical_work(problem: InversionProblem) -> dict[str, InversionWork]:
    """What each method takes where nothing was seen."""
    steps = problem.schedule.num_steps
    digits = max(-math.log10(problem.tol), 1.0) + 1.5  # a step is held tighter than the image
    more = PER_DIGIT ** (math.log10(TRUSTED_TOL / problem.tol))
    serial = CALLS_PER_DIGIT * digits * steps
    return {
        "equilibrium": InversionWork(ROUNDS * more, EVALUATIONS * more * steps),
        "fixed_point": InversionWork(serial, serial),
    }


def seconds_of_calls(work: InversionWork, batch: int, calls: Curve, limit: int | None) -> float:
    """Seconds of that many calls of equal size that have so many evaluations together."""
    rows = max(work.evaluations * batch / max(work.rounds, 1.0), 1.0)
    return work.rounds * calls.in_pieces(rows, calls.best_piece(math.ceil(rows), limit))


def measure_calls(problem: InversionProblem, costs: cost.Costs, rows: int) -> tuple[Curve, int]:
    """Measure calls of one row per image and of `rows` rows, where calls of about that size were not measured yet.

    Returns:
        What calls cost, and the evaluations that measuring took.
    """
    known, probes = costs.curve(), 0
    limit = min(rows, problem.max_batch or rows)
    sizes = [] if known is None else known.sizes
    wanted = [n for n in {min(problem.batch, limit), limit} if not any(2 / 3 <= n / size <= 3 / 2 for size in sizes)]
    if wanted:
        system = problem.system()
        for n in sorted(wanted):
            costs.set_call(
                n, cost.measure(system, problem.image.detach(), n, repeats=1, budget=0.1, clock=clock_of(problem))
            )
        probes = system.model_evals
    curve = costs.curve()
    assert curve is not None
    return curve, probes
