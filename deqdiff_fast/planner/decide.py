"""Serial chain, a window or all timesteps at once: what each would take, and the choice. A pure function of figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from ..nodes.grid import most_nodes
from ..plan import Candidate, Plan, RoundEstimate
from .cost_curve import MARGIN, Curve

OPTIMISM = 0.25  # a measurement must pay if further rows cost this part of what the last ones did
REACH = 4  # predictions are trusted up to this many times the largest batch that was measured


@dataclass
class PlannerInputs:
    """Everything that a decision rests on.

    step: seconds of one step of the serial chain. calls: seconds of a model call. overhead: seconds of a round outside
    of the model, given its rows. expect: what a solve with that window takes. correction: measured over predicted
    seconds of solves with that window. fits: whether the solver's memory for that window is there. limit: most rows in
    one call. max_rounds: most rounds that are allowed. previous: the window chosen last. nodes: numbers of them in the
    first rounds, where solves of all timesteps are made by rounds on nodes. windows: whether some timesteps at a time
    are a choice.
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
    nodes: list[int] = field(default_factory=list)
    windows: bool = True


def windows(steps: int) -> list[int]:
    """The windows of which the best one is a candidate: 2, 3, 4, 6, 8, 12 ... up to two thirds of the chain."""
    powers = [1 << k for k in range(1, steps.bit_length())]
    return [w for power in powers for w in (power, power + power // 2) if 3 * w <= 2 * steps]


def rows_of_rounds(
    effort: RoundEstimate, window: int, steps: int, batch: int, nodes: Sequence[int] = ()
) -> list[tuple[float, float]]:
    """[(rounds, rows)]: how many rounds have how many rows, their sum what `effort` says.

    A narrow window is full nearly always. A wide one empties: its rows fall like a power of the rounds that are left.
    Rounds on nodes begin with few of them; what is left is shared by the rounds that follow. nodes: see PlannerInputs.
    """
    width = min(window, steps) * batch
    if nodes and window >= steps:
        return _rows_on_nodes(effort, steps, batch, nodes)
    mean = min(effort.evaluations * steps * batch / effort.rounds, width)
    if mean > 0.9 * width:
        return [(effort.rounds, mean)]
    power, count = width / mean - 1, math.ceil(effort.rounds)
    falling = [(1 - (k + 0.5) / count) ** power for k in range(count)]
    total, share = sum(falling), effort.rounds / count
    return [(share, max(part / total * mean * count, 1.0)) for part in falling]


def _rows_on_nodes(
    effort: RoundEstimate, steps: int, batch: int, nodes: Sequence[int]
) -> list[tuple[float, float]]:  # fmt: skip
    """`rows_of_rounds` of rounds on nodes."""
    total, first = effort.evaluations * steps * batch, [float(n * batch) for n in nodes[:-1]]
    others, left = effort.rounds - len(first), total - sum(first)
    if others < 1 or left < others * batch:
        return [(effort.rounds, total / effort.rounds)]
    return [(1.0, n) for n in first] + [(others, min(left / others, float(steps * batch)))]


def most_rows(inputs: PlannerInputs, window: int) -> int:
    """Rows of the largest round of a solve, unless rounds on nodes do not suffice."""
    on_nodes = inputs.nodes and window >= inputs.steps
    return inputs.batch * (most_nodes(inputs.steps, inputs.nodes) if on_nodes else min(window, inputs.steps))


def _piece(inputs: PlannerInputs, calls: Curve, window: int) -> int:
    """Rows in one call with which a solve is fastest: what its largest rounds want, and no less where these are on
    nodes and rounds on all timesteps may follow."""
    widest, all_rows = most_rows(inputs, window), min(window, inputs.steps) * inputs.batch
    piece = calls.best_piece(widest, inputs.limit)
    if piece < widest:
        return piece
    trusted = min(max(int(REACH * calls.largest), piece), inputs.limit or all_rows)
    return max(piece, calls.best_piece(all_rows, trusted))


def predict(inputs: PlannerInputs, window: int, effort: RoundEstimate) -> tuple[float, int] | None:
    """(seconds, rows in one call) of a solve; None where nothing was measured, or too little."""
    calls, steps, batch = inputs.calls, inputs.steps, inputs.batch
    if calls is None:
        return None
    piece = _piece(inputs, calls, window)
    if min(piece, most_rows(inputs, window)) > REACH * calls.largest:
        return None
    rounds = rows_of_rounds(effort, window, steps, batch, inputs.nodes)
    return sum(count * (calls.in_pieces(rows, piece) + inputs.overhead(rows)) for count, rows in rounds), piece


def candidate(inputs: PlannerInputs, window: int) -> Candidate:
    """A solve with that window: what it takes, or why it cannot be made."""
    effort = inputs.expect(window)
    if not inputs.fits(window):
        return Candidate(window, effort, note="does not fit in the free memory")
    if inputs.max_rounds is not None and effort.rounds > inputs.max_rounds:
        return Candidate(window, effort, note="max_rounds does not suffice")
    predicted = predict(inputs, window, effort)
    if predicted is None:
        return Candidate(window, effort, note="batches of that size were not measured")
    seconds, piece = predicted
    return Candidate(window, effort, seconds * inputs.correction(window), piece)


def decide(inputs: PlannerInputs) -> Plan:
    """The candidate that is predicted to be the fastest; the serial chain unless a solve is clearly faster.

    The window that is compared is the one that fills the device: of those possible, the one predicted to be fastest.
    """
    steps, batch, previous = inputs.steps, inputs.batch, inputs.previous
    step_seconds = None if inputs.step is None else steps * inputs.step
    candidates = [Candidate(1, RoundEstimate(steps, 1.0), step_seconds, batch)]
    narrow = [candidate(inputs, window) for window in windows(steps) if inputs.windows]
    if narrow:
        candidates.append(min(narrow, key=lambda c: _seconds(c) * (MARGIN if c.window == previous else 1.0)))
    if steps > 1:
        candidates.append(candidate(inputs, steps))
    measured = () if inputs.calls is None else tuple(zip(inputs.calls.sizes, inputs.calls.seconds))
    chosen, reason = _choose(candidates, previous)
    return Plan(steps, batch, chosen, tuple(candidates), reason, measured)


def _seconds(candidate: Candidate) -> float:
    return math.inf if candidate.seconds is None else candidate.seconds


def _choose(candidates: list[Candidate], previous: int | None) -> tuple[Candidate, str]:
    serial, *solves = candidates
    best = min(solves, key=_seconds, default=serial)
    if serial.seconds is None:
        return serial, "nothing was measured yet: it starts serially, timing itself"
    if best.seconds is None or best is serial:
        return serial, "no solve is both possible and measured"
    last = next((c for c in solves if c.window == previous), None)
    if last is not None and best.seconds > MARGIN * _seconds(last):
        best = last  # which keeps its place until it is clearly behind, so that noise does not make the choice flutter
    ratio = serial.seconds / max(_seconds(best), 1e-12)
    if ratio < (1.0 if best is last else 1 / MARGIN):
        return serial, f"the best solve would take {1 / ratio:.2f} times as long as the serial chain"
    return best, f"it is predicted to be {ratio:.2f} times as fast as the serial chain"


def promising(inputs: PlannerInputs, sizes: list[int]) -> list[int]:
    """Those calls of so many rows that it may pay to measure: a solve that makes them would be chosen, did their
    further rows cost only `OPTIMISM` times as much as the last ones (nothing, where only one size was measured)."""
    calls, now = inputs.calls, decide(inputs).chosen.seconds
    if calls is None or now is None:
        return []
    known, found = dict(zip(calls.sizes, calls.seconds)), []
    each = OPTIMISM * calls.slope if len(known) > 1 else 0.0
    for rows in sizes:
        seconds = calls.seconds[-1] + each * (rows - calls.largest)
        then = decide(replace(inputs, calls=Curve(known | {rows: seconds}))).chosen
        if most_rows(inputs, then.window) > calls.largest and (then.seconds or 0.0) < MARGIN * now:
            found.append(rows)
    return found
