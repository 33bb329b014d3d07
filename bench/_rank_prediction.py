"""What more devices would take, from the rows of a solve, the cost of rows and the link between the devices."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from deqdiff_fast.planner.cost_curve import Curve
from deqdiff_fast.ranks.shares import message_bytes

DEVICES = (2, 4, 8, 16)


@dataclass(frozen=True)
class Link:
    """Seconds before the first byte of an all-gather arrives, and bytes a second into one device."""

    latency: float
    bandwidth: float

    def seconds(self, size: int, message: int) -> float:
        """Of an all-gather of that many bytes from each of `size` devices."""
        return self.latency + (size - 1) * message / self.bandwidth


# Round figures of what such links do in practice, none of them measured here.
LINKS = {"nvlink": Link(2e-5, 2e11), "pcie": Link(3e-5, 2e10), "25gbe": Link(1e-4, 2.5e9)}


def read_costs(path: Path) -> Curve:
    """The cost of a call, from a JSON file {"calls": {rows: seconds}}. Raises ValueError."""
    try:
        calls = json.loads(path.read_text(encoding="utf-8"))["calls"]
        return Curve({int(rows): float(seconds) for rows, seconds in calls.items()})
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f'--costs {path}: expected {{"calls": {{rows: seconds}}}}, got {error}') from error


def predict(rows: list[int], rest: float, costs: Curve, size: int, link: Link, row_bytes: int) -> float:
    """Seconds of a solve whose calls have so many rows, on `size` devices.

    Args:
        rest: seconds of all else, which every device does.
        row_bytes: of a row of the model's output.
    """
    calls = sum(costs(-(-n // size)) + link.seconds(size, message_bytes(n, size, row_bytes)) for n in rows)
    return rest + (calls if size > 1 else sum(costs(n) for n in rows))
