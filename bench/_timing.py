"""Paired timing: the sides take turns, so that a disturbance of the machine hits all of them; ratios are per turn."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

import torch


@dataclass
class Side:
    """One way to do the same work. `prepare` runs before every call, outside of the clock."""

    name: str
    call: Callable[[], object]
    prepare: Callable[[], object] = lambda: None
    seconds: list[float] = field(default_factory=list)
    """One figure for each pass: the median of that pass's calls."""
    calls: int = 1


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""cpu: the processor time of all threads together. On one thread of a machine that others use too it leaves out the
time that they took, which the wall clock puts on whichever side happened to run."""


def interleave(
    sides: list[Side], device: str, *, passes: int, budget: float, clock: str = "wall", visit: float = 0.005,
    warm: bool = True,
) -> None:  # fmt: skip
    """Fill `seconds` of every side, one figure for each pass.

    Every pass calls all sides, beginning with another one each time; a quick side is called often enough for about
    `visit` seconds and its median counts. A side that has used up `budget` seconds and has 3 figures sits out the
    allowed passes, so that ratios are formed over the passes that both sides took part in.

    Args:
        warm: whether every side is called twice before; False where the same sides were timed just now.
    """
    for side in sides if warm else ():
        for _ in range(2):  # first touch of the memory, compilation, thread pools
            first = _once(side, device, clock)
        side.calls = max(1, min(25, int(visit / max(first, 1e-9))))
    spent = dict.fromkeys((side.name for side in sides), 0.0)
    for turn in range(passes):
        for side in sides[turn % len(sides) :] + sides[: turn % len(sides)]:
            if spent[side.name] > budget and len(side.seconds) >= 3:
                continue
            taken = [_once(side, device, clock) for _ in range(side.calls)]
            spent[side.name] += sum(taken)
            side.seconds.append(median(taken))


def ratios(side: Side, base: Side) -> list[float]:
    """side / base, pass by pass."""
    return [a / b for a, b in zip(side.seconds, base.seconds, strict=False)]


def _once(side: Side, device: str, clock: str) -> float:
    side.prepare()
    if torch.device(device).type != "cuda":
        now = CLOCKS[clock]
        start = now()
        side.call()
        return now() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    begin.record()
    side.call()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1e3
