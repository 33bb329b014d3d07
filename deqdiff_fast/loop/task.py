"""What a loop is given and what it reports, whoever decides in it, the host or the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from .._types import Rows
from ..errors import NonFiniteError
from .base import Bounds, Chain, Solver, Stepper
from .window import Window

Evaluate = Callable[[Rows, int], None]
Rebuild = Callable[[Bounds, Bounds, bool], None]
Play = Callable[[tuple[str, int], Callable[[], None]], None]


def run_eager(key: tuple[str, int], work: Callable[[], None]) -> None:
    """Do the work: what a recorder of device graphs replaces."""
    work()


@dataclass
class Task:
    """A system to solve; see `iterate` for the fields."""

    chain: Chain
    solver: Stepper
    memory: Any
    evaluate: Evaluate
    rebuild: Rebuild
    diagnose: Callable[[int, int, int], NonFiniteError | None]
    freeze: float
    finish: float
    max_rounds: int
    report: Callable[[int, Window, Tensor], object]
    floor: float = 0.0
    start: int = 0
    made: int = 0
    """Rounds before this loop."""
    pad: Callable[[int], int] = int
    play: Play = run_eager
    board: Any = None
    """The `late.DeviceState` of a loop whose work is recorded."""
    warm: bool = False
    reach: float = 0.0
    left: float = 0.0
    before: Tensor | None = None

    def ends(self) -> tuple[float, float, float]:
        """finish, reach, left; rows that enter a window say nothing about how fast the others settle."""
        whole = self.chain.window >= self.chain.num_steps
        return self.finish, self.reach if whole else 0.0, self.left if whole else 0.0


@dataclass
class Progress:
    """What the loop did."""

    window: Window
    rounds: int = 0
    trace: list[Tensor] = field(default_factory=list)
    repairs: int = 0
    stopped: bool = False
    padding: int = 0
    """Rows that the model was called on without need: the host did not know yet that they were final."""


class Driver(Solver, Protocol):
    """A solver that makes its rounds itself, because they are not one model call on all active rows."""

    def drive(self, task: Task) -> Progress:
        """Solve `task.chain` in place: `iterate`, which says what the task holds."""
        ...


def restart_sample(task: Task, window: Window, sample: int) -> None:
    """Make all rows of a sample active again, where the window holds them all; what was remembered of them is gone."""
    if window.width < window.num_steps or window.lo[sample] == window.num_steps:
        return
    window.lo[sample], window.hi[sample] = task.start, window.num_steps
    old = [task.start if b == sample else window.num_steps for b in range(len(window.lo))]
    task.solver.enter(task.chain, task.memory, old, [window.num_steps] * len(old))
