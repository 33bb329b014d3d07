"""What a loop is given and what it reports, whoever decides in it, the host or the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .._types import Rows
from ..errors import NonFiniteError
from .base import Bounds, Chain, Solver
from .device_state import DeviceState
from .stopping import StoppingRule
from .window import Window

Evaluate = Callable[[Rows, int], None]
"""evaluate(rows, round): fills the predictions of those rows."""
Rebuild = Callable[[Bounds, Bounds, bool], None]
"""rebuild(old, new, broken): guesses the states of rows old[b] <= i < new[b], which enter the window or were lost to an
overflow."""
Diagnose = Callable[[int, int, int], "NonFiniteError | None"]
"""diagnose(step, sample, round): the error, where a non-finite row is the model's fault."""
Report = Callable[[int, Window, Tensor], object]
"""report(round, window, residual): called after every round; returning True stops."""
Replay = Callable[[tuple[str, int], Callable[[], None]], None]
"""replay(key, work): run a piece of device work that repeats under that key."""


def run_eager(key: tuple[str, int], work: Callable[[], None]) -> None:
    """Do the work: what a recorder of device graphs replaces."""
    work()


@dataclass(frozen=True)
class Lookahead:
    """How far the host runs ahead of a device: one round, but none when the end is near.

    near: a round whose largest residual is below `near` times the one to finish at may be the last, or the one before.
    A model call too many costs more than a wait then, so the host waits for the round just queued. 0: it never does.
    """

    near: float = 30.0


@dataclass
class DeviceWork:
    """How work on a device is queued. lookahead None: the host looks at every round before the next one."""

    lookahead: Lookahead | None = None
    pad: Callable[[int], int] = int
    """Rows of a model call -> rows that it is made with."""
    replay: Replay = run_eager
    state: DeviceState | None = None
    """The loop's memory on the device, where its work is recorded."""


@dataclass
class Task:
    """A system to solve."""

    chain: Chain
    solver: Solver
    memory: Any
    evaluate: Evaluate
    rebuild: Rebuild
    diagnose: Diagnose
    report: Report
    rule: StoppingRule
    max_rounds: int
    start: int = 0
    """How many rows are final already."""
    rounds_before: int = 0
    """Rounds before this loop, which count."""
    final: list[bool] | None = None
    """Which samples are solved already, where the window holds all timesteps; None for none."""
    warm: bool = False
    """Whether the states hold a trajectory that the caller gave."""
    doubted: list[bool] | None = None
    """Which samples do not end by a short step in the first round, see `StoppingRule.hold`; None for none."""
    device: DeviceWork = field(default_factory=DeviceWork)

    def first_window(self) -> Window:
        """The rows that are to be solved."""
        chain = self.chain
        window = Window(chain.num_steps, chain.batch, chain.window, self.start)
        if self.final is not None:
            window.lo = [chain.num_steps if final else 0 for final in self.final]
        return window

    def restart_sample(self, window: Window, sample: int) -> None:
        """Make all rows of a sample active again, where the window holds them all; what is remembered of them goes."""
        if window.width < window.num_steps or window.lo[sample] == window.num_steps:
            return
        window.lo[sample], window.hi[sample] = self.start, window.num_steps
        old = [self.start if b == sample else window.num_steps for b in range(len(window.lo))]
        self.solver.enter(self.chain, self.memory, old, [window.num_steps] * len(old))

    def blame(self, step: int, sample: int, round: int) -> None:
        """Raises the error of a model that is to blame for a row that is not finite."""
        error = self.diagnose(step, sample, round)
        try:
            if error is not None:
                raise error
        finally:
            del error  # its traceback would hold this frame, and with it the memory of the solve


@dataclass
class Progress:
    """What the loop did."""

    window: Window
    rounds: int = 0
    trace: list[Tensor] = field(default_factory=list)
    """(B,) each: the longest relative step of every round."""
    repairs: int = 0
    stopped: bool = False
    """Whether `report` asked for the end."""
    padding: int = 0
    """Rows that the model was called on without need: the host did not know yet that they were final."""
