"""The table of the zoo."""

from __future__ import annotations

import math
from statistics import median
from typing import Any

from .._common import markdown, spread
from ._measure import TARGETS


def table(rows: list[dict[str, Any]]) -> str:
    """One line for each model and chain."""
    estimated = any(run["solve"]["estimate"] is not None for row in rows for run in row["runs"])
    targets = [f"{target:.0e}".replace("e-0", "e-") for target in TARGETS]
    header = [
        "model", "T", "eta", *(f"rounds to {target}" for target in targets), "rounds at stop", "evaluations / T",
        "error at stop", *(["estimate"] if estimated else []), "loop", "sample()", "loop / sample()", "planned serial",
        "false",
    ]  # fmt: skip
    return markdown(header, [_cells(row, estimated) for row in rows])


def _cells(row: dict[str, Any], estimated: bool) -> list[str]:
    solves, plans = ([run[part] for run in row["runs"]] for part in ("solve", "planned"))
    estimates = [solve["estimate"] for solve in solves if solve["estimate"] is not None]
    reached = [_reached(solves, k) for k in range(len(TARGETS))]
    loop, sample = (median(s for plan in plans for s in plan[f"{side}_seconds"]) for side in ("loop", "sample"))
    false = sum(found["false"] for found in solves + plans)
    return [
        row["model"], str(row["steps"]), f"{row['eta']:g}", *reached, f"{median(s['rounds'] for s in solves):g}",
        f"{median(s['evaluations'] for s in solves) / row['steps']:.2f}", f"{median(s['error'] for s in solves):.1e}",
        *([f"{median(estimates):.1e}" if estimates else ""] if estimated else []),
        f"{1e3 * loop:.3g} ms", f"{1e3 * sample:.3g} ms", spread([r for plan in plans for r in plan["ratios"]]),
        f"{median(plan['serial_share'] for plan in plans):.0%}", f"{false} of {len(solves) + len(plans)}",
    ]  # fmt: skip


def _reached(solves: list[dict[str, Any]], k: int) -> str:
    """Rounds to target k; marked where a solve at its own stopping had not come that far."""
    value = median(solve["rounds_to"][k] for solve in solves)
    mark = "*" if any(solve["by_tight"][k] for solve in solves) else ""
    return (f"{value:g}" if math.isfinite(value) else "never") + mark
