"""The tables of the inversion benchmark: header, cells and a remark each."""

from __future__ import annotations

from statistics import median
from typing import Any

Table = tuple[tuple[str, ...], list[tuple[str, ...]], str]
Measurements = list[dict[str, Any]]

BETTER_THAN_DDIM, DEPTH, EVALUATIONS = 20, 4, 20  # what equilibrium inversion is held to


def round_trips(rows: Measurements) -> Table:
    """The direct methods: errors through the serial chain, against those of DDIM inversion, and sequential depth."""
    header = (
        "T", "method", "median error", "largest error", "converged", "DDIM's error / error", "rounds",
        "fixed point's rounds / rounds at equal loss", "evaluations / image", "seconds",
    )  # fmt: skip
    members = [row for row in rows if row["table"] == "round trip"]
    cells = []
    for row in members:
        ddim, fixed = _partner(members, row, "ddim"), _partner(members, row, "fixed_point")
        gain = "" if ddim is None else f"{median(ddim['errors']) / max(median(row['errors']), 1e-300):.1f}"
        depth = "" if fixed is None else f"{_depth(fixed, row):.1f}"
        cells.append((
            str(row["steps"]), row["method"], f"{median(row['errors']):.1e}", f"{max(row['errors']):.1e}",
            f"{sum(row['converged'])}/{row['images']}", gain, str(row["rounds"]), depth,
            f"{row['evaluations'] / row['images']:.0f}", f"{row['seconds']:.1f}",
        ))  # fmt: skip
    return header, cells, (
        "Errors: relative L2 between the image and what the serial chain makes of the noise. Rounds: model calls that "
        f"wait for each other; equal loss: the larger of the two medians at the end. Aims for equilibrium: "
        f"{BETTER_THAN_DDIM} times below DDIM inversion, and a {DEPTH}th of the fixed point's rounds."
    )  # fmt: skip


def descents(rows: Measurements) -> Table:
    """All methods on the same images; the descents from the same noise."""
    header = (
        "T", "method", "optimizer steps", "squared loss", "relative error", "evaluations / image",
        "back-propagations / image", "rounds", "seconds", "ended by",
    )  # fmt: skip
    cells = [
        (
            str(row["steps"]), row["method"], str(row["optimizer_steps"] or ""), f"{median(row['losses']):.3g}",
            f"{median(row['errors']):.1e}", f"{row['evaluations'] / row['images']:.0f}",
            f"{row['backpropagations'] / row['images']:.0f}", str(row["rounds"]), f"{row['seconds']:.1f}",
            _ended(row),
        )
        for row in rows
        if row["table"] == "descent"
    ]  # fmt: skip
    return (
        header,
        cells,
        (
            "Medians over the images. Evaluations count the activations that back-propagation recomputes; rounds are "
            "those of the forward chains."
        ),
    )


def comparison(rows: Measurements) -> Table:
    """What it takes to get to the loss of the paper's method, without what back-propagation recomputes."""
    header = ("T", "loss", "bptt", "phantom", "implicit", "equilibrium", "bptt / equilibrium", f"{EVALUATIONS} times")
    cells = []
    members = [row for row in rows if row["table"] == "descent"]
    for row in members:
        if row["method"] != "phantom":
            continue
        target, count = row["curve"][-1][3], row["images"]
        taken = {}
        for name in ("bptt", "phantom", "implicit", "equilibrium"):
            other = _partner(members, row, name)
            taken[name] = (None, False) if other is None else _evaluations_to(other, target)
        base, mine = taken["bptt"], taken["equilibrium"]
        ratio = decision = ""
        if base[0] is not None and mine[0] is not None:
            ratio = f"{'> ' if not base[1] else ''}{base[0] / mine[0]:.1f}" if mine[1] else "not reached"
            enough = base[0] >= EVALUATIONS * mine[0]
            decision = "FAIL" if not mine[1] or (base[1] and not enough) else "PASS" if enough else "open"
        shown = [
            "" if value is None else f"{'' if reached else '> '}{value / count:.0f}"
            for value, reached in taken.values()
        ]
        cells.append((str(row["steps"]), f"{target:.3g}", *shown, ratio, decision))
    return (
        header,
        cells,
        (
            "Evaluations per image, forward passes only. > n: not reached with n. open: the baseline ended before it "
            "could tell; give it more epochs or seconds."
        ),
    )


def _partner(rows: Measurements, row: dict[str, Any], name: str) -> dict[str, Any] | None:
    return next((other for other in rows if other["method"] == name and other["steps"] == row["steps"]), None)


def _ended(row: dict[str, Any]) -> str:
    limit = "epochs" if row["optimizer_steps"] else "rounds"
    return {"callback": "seconds", "max_rounds": limit}.get(row["stop_reason"], str(row["stop_reason"]))


def _depth(fixed: dict[str, Any], row: dict[str, Any]) -> float:
    """How many times the rounds of `row` the fixed point needs to a loss that both get to."""
    loss = max(fixed["curve"][-1][3], row["curve"][-1][3])
    first, second = (
        next(rounds for *_, reached, rounds in other["curve"] if reached <= loss) for other in (fixed, row)
    )
    return float(first / second)


def _evaluations_to(row: dict[str, Any], loss: float) -> tuple[int, bool]:
    """Forward evaluations at the first point of the curve with at most that loss; all of them if there is none."""
    for _, _, forward, reached, _ in row["curve"]:
        if reached <= loss:
            return forward, True
    return row["forward_evaluations"], False
