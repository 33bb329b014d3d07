"""Serial chain, windows or all timesteps at once: what each would take, and the choice. A pure function of figures."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace

from ..plan import Candidate, Plan, RoundEstimate

MARGIN = 0.95  # a parallel solve must promise to take at most this part of the serial chain's time
HYSTERESIS = 0.92  # and another window than the last one at most this part of that one's
ABORT_RATIO = (
    1.15  # a running solve is given up where it is predicted to take this many times what the serial rest would
)
REACH = 4  # predictions are trusted up to this many times the largest batch that was measured
OPTIMISM = 0.25  # a measurement must pay if further rows cost this part of what the last ones did
SAME = 1.05  # a smaller piece must make a round this much cheaper
COARSE, COARSE_ROWS = 0.75, 9  # coarse rounds of about 9 timesteps must cost less than this part of a full one


class Curve:
    """Seconds of one model call over its rows: linear between measured sizes, never falling.

    Beyond the largest size a row costs what the last ones did, and at least a quarter of their mean.
    """

    def __init__(self, points: dict[int, float]) -> None:
        if not points or any(n < 1 or not (0 <= s < math.inf) for n, s in points.items()):
            raise ValueError(f"points: expected {{rows >= 1: seconds >= 0}}, at least one, got {points}")
        self.sizes = sorted(points)
        self.seconds: list[float] = []
        for n in self.sizes:
            self.seconds.append(max(points[n], self.seconds[-1] if self.seconds else 0.0))

    @property
    def largest(self) -> int:
        return self.sizes[-1]

    @property
    def slope(self) -> float:
        """Seconds of one more row, from the last two sizes."""
        (*_, n), (*_, last) = self.sizes, self.seconds
        return last / n if len(self.sizes) == 1 else (last - self.seconds[-2]) / (n - self.sizes[-2])

    def __call__(self, rows: float) -> float:
        sizes, seconds = self.sizes, self.seconds
        if rows <= sizes[0]:
            return seconds[0]
        if rows <= sizes[-1]:
            k = bisect_left(sizes, rows)
            part = (rows - sizes[k - 1]) / (sizes[k] - sizes[k - 1])
            return seconds[k - 1] + part * (seconds[k] - seconds[k - 1])
        return seconds[-1] + (rows - sizes[-1]) * max(self.slope, seconds[-1] / sizes[-1] / 4)

    def in_pieces(self, rows: float, piece: int) -> float:
        """Seconds of calls of `piece` rows each that together have that many."""
        whole = int(rows // piece)
        rest = rows - whole * piece
        return whole * self(piece) + (self(rest) if rest > 0 else 0.0)

    def best_piece(self, rows: int, limit: int | None) -> int:
        """The rows in one call with which that many rows take the shortest, at most `limit`."""
        top = min(rows, limit or rows)
        best, best_seconds = top, self.in_pieces(rows, top)
        for piece in self.sizes:
            if piece < top and self.in_pieces(rows, piece) * SAME < best_seconds:
                best, best_seconds = piece, self.in_pieces(rows, piece)
        return best


@dataclass
class PlannerInputs:
    """Everything that a decision rests on.

    step: seconds of one step of the serial chain. calls: seconds of a model call. overhead: seconds of a round outside
    of the model, given its rows. expect: what a solve with that window takes. correction: seconds seen over seconds
    predicted, of solves with that window. fits: whether the solver's memory for that window is there. limit: most rows
    in one call. max_rounds: most rounds that were allowed. previous: the window chosen last.
    """

    steps: int
    batch: int
    step: float | None
    calls: Curve | None
    expect: Callable[[int], RoundEstimate]
    overhead: Callable[[float], float] = lambda rows: 0.0
    correction: Callable[[int], float] = lambda window: 1.0
    fits: Callable[[int], bool] = lambda window: True
    limit: int | None = None
    max_rounds: int | None = None
    previous: int | None = None


def windows(steps: int) -> list[int]:
    """The windows that are compared: 1 (serial), 2, 3, 4, 6, 8, 12 ... and all of them."""
    sizes = {1, steps}
    for k in range(1, steps.bit_length()):
        sizes |= {w for w in (1 << k, 3 << (k - 1)) if w < steps}
    return sorted(sizes)


def rows_of_rounds(effort: RoundEstimate, window: int, steps: int, batch: int) -> list[tuple[float, float]]:
    """[(rounds, rows)]: how many rounds have how many rows, their sum what `effort` says.

    A narrow window is full nearly always. A wide one empties: its rows fall like a power of the rounds that are left.
    """
    width = min(window, steps) * batch
    mean = min(effort.evaluations * steps * batch / effort.rounds, width)
    if mean > 0.9 * width:
        return [(effort.rounds, mean)]
    power, count = width / mean - 1, math.ceil(effort.rounds)
    falling = [(1 - (k + 0.5) / count) ** power for k in range(count)]
    total, share = sum(falling), effort.rounds / count
    return [(share, max(part / total * mean * count, 1.0)) for part in falling]


def predict(situation: PlannerInputs, window: int, effort: RoundEstimate) -> tuple[float, int] | None:
    """(seconds, rows in one call) of a solve; None where nothing was measured, or too little."""
    calls, steps, batch = situation.calls, situation.steps, situation.batch
    if calls is None:
        return None
    piece = calls.best_piece(min(window, steps) * batch, situation.limit)
    if piece > REACH * calls.largest:
        return None
    seconds = sum(
        count * (calls.in_pieces(rows, piece) + situation.overhead(rows))
        for count, rows in rows_of_rounds(effort, window, steps, batch)
    )
    return seconds, piece


def decide(situation: PlannerInputs) -> Plan:
    """The candidate that is predicted to be the fastest; the serial chain unless a solve is clearly faster."""
    steps, batch = situation.steps, situation.batch
    serial = Candidate(1, RoundEstimate(steps, 1.0), None if situation.step is None else steps * situation.step, batch)
    candidates = [serial, *(_candidate(situation, window) for window in windows(steps) if window > 1)]
    measured = () if situation.calls is None else tuple(zip(situation.calls.sizes, situation.calls.seconds))
    chosen, reason = _choose(situation, serial, candidates)
    return Plan(steps, batch, chosen, tuple(candidates), reason, measured)


def _candidate(situation: PlannerInputs, window: int) -> Candidate:
    effort = situation.expect(window)
    if not situation.fits(window):
        return Candidate(window, effort, note="does not fit in the free memory")
    if situation.max_rounds is not None and effort.rounds > situation.max_rounds:
        return Candidate(window, effort, note="max_rounds does not suffice")
    predicted = predict(situation, window, effort)
    if predicted is None:
        return Candidate(window, effort, note="batches of that size were not measured")
    seconds, piece = predicted
    return Candidate(window, effort, seconds * situation.correction(window), piece)


def _choose(situation: PlannerInputs, serial: Candidate, candidates: list[Candidate]) -> tuple[Candidate, str]:
    timed = [c for c in candidates[1:] if c.seconds is not None]
    if serial.seconds is None:
        return serial, "nothing was measured yet: it starts serially, timing itself"
    if not timed:
        return serial, "no solve is both possible and measured"
    best = min(timed, key=lambda c: c.seconds or 0.0)
    last = next((c for c in timed if c.window == situation.previous), None)
    assert best.seconds is not None
    if last is not None and last.seconds is not None and best.seconds > HYSTERESIS * last.seconds:
        best = last
    assert best.seconds is not None
    # the one chosen last keeps its place until it is behind, so that noise does not make the choice flutter
    bar = 1.0 if best is last else MARGIN
    ratio = serial.seconds / max(best.seconds, 1e-12)
    if best.seconds > bar * serial.seconds:
        return serial, f"the best solve would take {1 / ratio:.2f} times as long as the serial chain"
    return best, f"it is predicted to be {ratio:.2f} times as fast as the serial chain"


def coarse_pays(plan: Plan) -> bool:
    """Whether first rounds on few timesteps are that much cheaper: they save evaluations, and may cost a round."""
    if not plan.measured or plan.chosen.window < plan.steps:
        return True
    calls, rows = Curve(dict(plan.measured)), plan.steps * plan.batch
    return calls(min(COARSE_ROWS * plan.batch, rows)) < COARSE * calls.in_pieces(rows, plan.chosen.piece or rows)


def promising(situation: PlannerInputs, sizes: list[int]) -> list[int]:
    """Those calls of so many rows that it may pay to measure: a solve that makes them would be chosen, did their
    further rows cost only `OPTIMISM` times as much as the last ones (nothing, where only one size was measured)."""
    calls, now = situation.calls, decide(situation).chosen.seconds
    if calls is None or now is None:
        return []
    known, found = dict(zip(calls.sizes, calls.seconds)), []
    each = OPTIMISM * calls.slope if len(known) > 1 else 0.0
    for rows in sizes:
        seconds = calls.seconds[-1] + each * (rows - calls.largest)
        then = decide(replace(situation, calls=Curve(known | {rows: seconds}))).chosen
        if then.window * situation.batch > calls.largest and (then.seconds or 0.0) < MARGIN * now:
            found.append(rows)
    return found


def work_left(done: int, effort: RoundEstimate, front: int, steps: int, window: int) -> float:
    """What a running solve may still need, in units of its last round.

    One that is overdue is expected to go on as long as it is overdue. front: how many timesteps are final.
    """
    planned = rows_of_rounds(effort, window, steps, 1)
    if len(planned) > done:
        left = sum(count * rows for count, rows in planned[done:]) / max(planned[done - 1][1], 1e-9)
    else:
        left = effort.rounds - done if done < effort.rounds else 1.0 + (done - effort.rounds)
    if window < steps and done >= 3:  # a window moves at a steady pace
        left = max(left, (steps - front) * done / front if front else float(steps))
    return min(max(left, 0.5), float(steps - front))


def give_up(left: float, round_seconds: float, serial_left: int, step: float) -> bool:
    """Whether finishing serially is clearly faster than `left` more rounds that take as long as the last one."""
    return left * round_seconds > ABORT_RATIO * serial_left * step
