"""Parareal: blocks of the chain solved side by side, tied together by one long step over each block."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

from ..loop.base import LeasedTensors, MemoryRequest, ProblemSize, Solver
from ..loop.task import Progress, Task
from .parareal_loop import PararealLoop, PararealMemory


@dataclass(frozen=True)
class Parareal(Solver):
    """Parareal (Lions, Maday, Turinici 2001) as in SRDS (Selvam et al. 2024, arXiv 2412.08292), for comparison.

    The T steps are cut into N blocks. A sweep of long steps G, one over each block, gives the first block ends U. Then,
    again and again: the real steps F inside all blocks, side by side, and a sweep U'[j+1] = F(U[j]) + G(U'[j]) -
    G(U[j]). After k times the first k blocks are exact and are left alone, so that it is exact after N times whatever
    the model.

    G holds the predicted clean sample, x0 = p x + q E, for all steps of its block and makes them at once; noise that is
    added inside the block is carried along. Of a deterministic DDIM, Euler or flow matching chain that is one step of
    the same sampler from end to end, and of a DDPM chain the mean of one. F begins with the prediction that G has asked
    for at the same state. So N rounds come first, and an iteration is at most T / N - 1 (rounded up) rounds on one
    timestep of every block and N - 1 on one timestep each; `rounds` counts all calls that wait for each other. It wants
    the whole chain as its window.

    Args:
        blocks: N; None: the whole number nearest to sqrt(T), as in the paper.
        max_rounds: rounds before giving up, None for as many as it takes to be exact.
        safety: a sample is final when its block ends moved by no more than `safety` times the tolerance, relative to
            their size (the paper looks at the last one).

    Raises:
        ValueError: a bad setting; where it is used, a schedule of more than one lag, a window, more blocks than steps,
            or a step whose prediction does not determine the clean sample.
    """

    blocks: int | None = None
    max_rounds: int | None = None
    safety: float = 0.7
    guess: str = field(default="copy", init=False)
    freeze: float = field(default=0.0, init=False)
    makes_rounds = True

    def __post_init__(self) -> None:
        for name in ("blocks", "max_rounds"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name}: expected an int >= 1 or None, got {value!r}")
        if not 0 < self.safety <= 1:
            raise ValueError(f"safety: expected a number in (0, 1], got {self.safety!r}")

    def check(self, steps: int, lags: int, window: int | str) -> None:
        """Whether such a chain can be solved. Raises ValueError."""
        if lags != 1:
            raise ValueError(f"solver: 'parareal' expected a schedule whose steps look one state back, got {lags}; a "
                             "block of a multistep chain cannot begin from one state")  # fmt: skip
        if window != "auto" and int(window) < steps:
            raise ValueError(f"window: expected 'auto' or at least T = {steps} for 'parareal', got {window}")
        if self.blocks is not None and self.blocks > steps:
            raise ValueError(f"blocks: expected at most T = {steps}, got {self.blocks}")

    def edges(self, steps: int) -> list[int]:
        """The N + 1 states at which blocks begin and end."""
        count = self.blocks or max(round(math.sqrt(steps)), 1)
        return [j * steps // count for j in range(count + 1)]

    def round_limit(self, steps: int) -> int:
        """The rounds after which every sample is exact."""
        edges = self.edges(steps)
        count = len(edges) - 1
        longest = max(b - a for a, b in itertools.pairwise(edges))
        return count + count * (longest - 1) + count * (count - 1) // 2

    def plan_memory(self, request: MemoryRequest, size: ProblemSize) -> None:
        shape = (len(self.edges(size.num_steps)) - 1, size.batch, size.numel)
        request.add("parareal.fine", shape, size.dtype)
        request.add("parareal.coarse", shape, size.dtype)

    def start(self, tensors: LeasedTensors) -> PararealMemory:
        return PararealMemory(tensors["parareal.fine"], tensors["parareal.coarse"])

    def solve(self, task: Task) -> Progress:
        """All rounds of a solve."""
        return PararealLoop(task, self.edges(task.chain.num_steps)).run()
