"""What a solve is going to do and why: data, and its text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class RoundEstimate(NamedTuple):
    """What one solve takes. evaluations: per timestep and sample."""

    rounds: float
    evaluations: float


@dataclass(frozen=True)
class Candidate:
    """One way to make the sample. window 1 is the serial chain; seconds is None where nothing was measured."""

    window: int
    effort: RoundEstimate
    seconds: float | None = None
    piece: int | None = None
    note: str = ""


@dataclass(frozen=True)
class Plan:
    """What a solve will do and why; `str(plan)` says it in words and numbers."""

    steps: int
    batch: int
    chosen: Candidate
    candidates: tuple[Candidate, ...]
    reason: str
    measured: tuple[tuple[int, float], ...] = ()

    @property
    def serial(self) -> bool:
        return self.chosen.window == 1

    @property
    def serial_seconds(self) -> float | None:
        return self.candidates[0].seconds

    def __str__(self) -> str:
        return describe(self)


def seconds(value: float | None) -> str:
    """1.23 s, 12.3 ms, 123 us."""
    if value is None:
        return "not known"
    for size, unit in ((1.0, "s"), (1e-3, "ms")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-6:.3g} us"


def title(candidate: Candidate, steps: int) -> str:
    if candidate.window == 1:
        return "serial chain"
    return f"all {steps} timesteps" if candidate.window >= steps else f"window of {candidate.window}"


def describe(plan: Plan) -> str:
    """Several lines: the choice and its reason, what a call costs, what each way would take."""
    samples = f"{plan.batch} sample{'s' * (plan.batch != 1)}"
    chosen = title(plan.chosen, plan.steps)
    if not plan.serial:
        chosen += f" at a time, at most {plan.chosen.piece} rows in one model call"
    lines = [f"{plan.steps} timesteps, {samples}: {chosen}, since {plan.reason}."]
    if plan.measured:
        costs = ", ".join(f"{n} row{'s' * (n != 1)} {seconds(cost)}" for n, cost in plan.measured)
        lines.append(f"one model call: {costs}")
    for candidate in plan.candidates:
        mark = "->" if candidate == plan.chosen else "  "
        rounds, evaluations = candidate.effort.rounds, candidate.effort.evaluations * plan.steps * plan.batch
        what = seconds(candidate.seconds) if not candidate.note else candidate.note
        name = title(candidate, plan.steps)
        lines.append(f"{mark} {name:<20} {rounds:6.1f} rounds {evaluations:8.0f} model evaluations  {what}")
    return "\n".join(lines)
