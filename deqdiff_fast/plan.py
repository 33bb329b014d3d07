"""What a solve is going to do and why: data, and its text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class RoundEstimate(NamedTuple):
    """Rounds and model evaluations of one solve.

    Attributes:
        rounds: batched model calls that wait for each other; T for the serial chain.
        evaluations: model evaluations per timestep and sample; 1 for the serial chain.
    """

    rounds: float
    evaluations: float


@dataclass(frozen=True)
class Candidate:
    """One way to make the sample: the serial chain, a window of timesteps at a time, or all timesteps at once.

    Attributes:
        window: timesteps solved at a time; 1 is the serial chain, T all of them.
        effort: rounds and evaluations that it is expected to take.
        seconds: what it is predicted to take; None where that is not known.
        piece: most rows (samples x timesteps) in one model call.
        note: why it is not possible, or not predicted; else empty.
    """

    window: int
    effort: RoundEstimate
    seconds: float | None = None
    piece: int | None = None
    note: str = ""


@dataclass(frozen=True)
class Plan:
    """What a solve will do and why; `str(plan)` says it in words and numbers.

    Attributes:
        steps: T, timesteps of the chain.
        batch: B, samples of the solve.
        chosen: the candidate that will be used.
        candidates: all that were compared; the first is the serial chain.
        reason: why, as the second half of a sentence.
        measured: (rows, seconds) of one model call, by rows; empty where nothing was measured yet.
    """

    steps: int
    batch: int
    chosen: Candidate
    candidates: tuple[Candidate, ...]
    reason: str
    measured: tuple[tuple[int, float], ...] = ()

    @property
    def serial(self) -> bool:
        """Whether the sample will be made by the serial chain."""
        return self.chosen.window == 1

    @property
    def serial_seconds(self) -> float | None:
        """What the serial chain is predicted to take, in seconds; None where its step was not measured yet."""
        return self.candidates[0].seconds

    @property
    def summary(self) -> str:
        """What will be done and why, in one sentence."""
        samples = f"{self.batch} sample{'s' * (self.batch != 1)}"
        chosen = self._title(self.chosen)
        if not self.serial:
            chosen += f" at a time, at most {self.chosen.piece} rows in one model call"
        return f"{self.steps} timesteps, {samples}: {chosen}, since {self.reason}."

    def __str__(self) -> str:
        lines = [self.summary]
        if self.measured:
            costs = ", ".join(f"{n} row{'s' * (n != 1)} {_duration(cost)}" for n, cost in self.measured)
            lines.append(f"one model call: {costs}")
        for candidate in self.candidates:
            rounds, evaluations = candidate.effort
            lines.append(
                f"{'->' if candidate == self.chosen else '  '} {self._title(candidate):<20} {rounds:6.1f} rounds "
                f"{evaluations * self.steps * self.batch:8.0f} model evaluations  "
                f"{candidate.note or _duration(candidate.seconds)}"
            )
        return "\n".join(lines)

    def _title(self, candidate: Candidate) -> str:
        if candidate.window == 1:
            return "serial chain"
        return f"all {self.steps} timesteps" if candidate.window >= self.steps else f"window of {candidate.window}"


def _duration(seconds: float | None) -> str:
    """1.23 s, 12.3 ms, 123 us."""
    if seconds is None:
        return "not known"
    for size, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"
