"""What the settings of solvers that keep secants must be."""

from __future__ import annotations

from typing import Any


def check_settings(history: Any, ridge: float, floor: float, coarse: Any, max_rounds: int | None) -> None:
    """Raises ValueError, naming the setting."""
    if isinstance(history, bool) or not isinstance(history, int) or not 0 <= history <= 7:
        raise ValueError(f"history: expected an int from 0 to 7, got {history!r}")
    if not (ridge > 0 and floor >= 0):
        raise ValueError(f"ridge, floor: expected ridge > 0 and floor >= 0, got {ridge!r}, {floor!r}")
    if not are_intervals(coarse):
        raise ValueError(f"coarse: expected a tuple of ints >= 1, got {coarse!r}")
    if max_rounds is not None and not max_rounds >= 1:
        raise ValueError(f"max_rounds: expected an int >= 1 or None, got {max_rounds!r}")


def are_intervals(coarse: Any) -> bool:
    """Whether it is a tuple of numbers of intervals."""
    return isinstance(coarse, tuple) and all(type(n) is int and n >= 1 for n in coarse)
