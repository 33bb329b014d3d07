"""Nested iteration: the first rounds evaluate a few timesteps only, and what the model does in between is interpolated.

A prediction is E_i = c_i X_i + R_i with the diagonal slope c. In the first rounds the iterate is far off, and the
remainder R, as a function of time, is known well enough from a handful of timesteps. It is interpolated linearly in the
units of the predicted clean sample (R_i q_i, with x0 = p x + q E), where it is smooth up to the image end; in units of
the prediction it is not, for q goes to zero there. The chain itself is never coarsened: every step of it is made in
every round, so this works for any schedule, multistep and stochastic ones included. Cf. the coarse grids of nested
iteration in multigrid methods (Brandt 1977) and of ParaSolver (ICLR 2025).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .._types import Rows
from .base import Chain, Solver
from .stopping import relative_steps
from .task import Evaluate, Replay, Report, run_eager
from .window import Window

FEWEST = 8  # intervals of a grid on a chain that adds noise


class Cache(Protocol):
    """`make()`, or what it returned for that key before."""

    def __call__(self, key: Hashable, make: Callable[[], Grid]) -> Grid: ...


def uncached(key: Hashable, make: Callable[[], Grid]) -> Grid:
    """A `Cache` that remembers nothing."""
    return make()


class Grid(NamedTuple):
    """What one coarse round evaluates; everything lies on the device already, so that no round waits for it."""

    rows: Rows
    timesteps: Tensor  # (n,) int64
    evaluated: Tensor  # (T,) bool, where they are
    interpolation: Tensor  # (T, n), see `interpolation`


class CoarseRounds:
    """The rounds on coarse grids that come before the loop; the window is the whole chain.

    Args:
        remainder: (1 + the largest of intervals, B, D) scratch.
        weight: (T,) q_i, see above.
        intervals: of each grid, one round a grid; see `Solver.coarse_grids`.
        cache: remembers what follows from the weight.
    """

    def __init__(
        self,
        chain: Chain,
        solver: Solver,
        memory: Any,
        remainder: Tensor,
        weight: Tensor,
        intervals: tuple[int, ...],
        cache: Cache = uncached,
    ) -> None:
        self.chain, self.solver, self.memory, self.remainder, self.cache = chain, solver, memory, remainder, cache
        made = {count: self._grid(count, weight) for count in intervals}
        self.grids = [made[count] for count in intervals]
        self.residuals = torch.empty(len(intervals), chain.batch, dtype=chain.sq_diff.dtype, device=chain.lo.device)
        self.trace: list[Tensor] = []
        """(B,) each, of every round until the next run."""

    def _grid(self, intervals: int, weight: Tensor) -> Grid:
        chain, steps, device = self.chain, self.chain.num_steps, self.chain.states.device
        chosen = self.solver.snap_to_anchors(chain, grid(steps, intervals))

        def make() -> Grid:
            at = torch.tensor(chosen, device=device)
            flat = (at[:, None] * chain.batch + torch.arange(chain.batch, device=device)).flatten()
            rows = Rows(flat, chosen[0], chosen[-1] + 1, len(flat))
            evaluated = torch.zeros(steps, dtype=torch.bool, device=device).index_fill_(0, at, True)
            return Grid(rows, at, evaluated, interpolation(chosen, steps, weight).to(self.remainder))

        return self.cache(("grid", tuple(chosen), chain.batch, device, self.remainder.dtype), make)

    def run(self, evaluate: Evaluate, report: Report | None, replay: Replay = run_eager) -> bool:
        """Make the rounds; report: None where nobody watches. Returns whether it asks to stop."""
        chain, self.trace = self.chain, []
        chain.lo.fill_(0), chain.hi.fill_(chain.num_steps)
        window = Window(chain.num_steps, chain.batch, chain.window)
        for round, place in enumerate(self.grids, 1):
            evaluate(place.rows, round)
            replay(("coarse", round), partial(self._advance, place, round))
            self.trace.append(self.residuals[round - 1])
            if report is not None and report(round, window, self.trace[-1].cpu()) is True:
                return True
        return False

    def _advance(self, place: Grid, round: int) -> None:
        """The solver's step for a grid whose predictions are there."""
        self._interpolate(place)
        self.solver.step_interpolated(self.chain, self.memory, round, place.evaluated)
        torch.amax(relative_steps(self.chain), 0, out=self.residuals[round - 1])

    def _interpolate(self, place: Grid) -> None:
        """Predictions of every row from those of the grid."""
        chain, remainder = self.chain, self.remainder[: len(place.timesteps)]
        linear = self.solver.draft_predictions(chain, self.memory)
        torch.index_select(chain.predictions, 0, place.timesteps, out=remainder)
        if linear is None:
            slope = chain.slope[place.timesteps, None]
            remainder.addcmul_(slope, chain.states[place.timesteps], value=-1)
        else:
            remainder.sub_(linear[place.timesteps])
        remainder.nan_to_num_(0.0, 0.0, 0.0)  # what the model has failed on is for the full rounds to find and report
        torch.mm(place.interpolation, remainder.flatten(1), out=chain.predictions.flatten(1))
        if linear is None:
            chain.predictions.addcmul_(chain.slope[:, None], chain.states[:-1])
        else:
            chain.predictions.add_(linear)


def grid(steps: int, intervals: int) -> list[int]:
    """The distinct timesteps nearest to 0, ..., steps - 1 in equal parts; doubling the parts keeps the old ones."""
    return sorted({round(k * (steps - 1) / intervals) for k in range(intervals + 1)})


def interpolation(step: list[int], steps: int, weight: Tensor) -> Tensor:
    """(steps, n): how much of n timesteps, the first and the last of the chain among them, is in every timestep; linear
    between neighbours in what was multiplied by weight: (steps,), where that is not 0; like the weight."""
    known, row = torch.tensor(step, device=weight.device), torch.arange(steps, device=weight.device)
    left = (torch.searchsorted(known, row, right=True) - 1).clamp_max_(max(len(step) - 2, 0))
    right = (left + 1).clamp_max_(len(step) - 1)
    part = (row - known[left]) / (known[right] - known[left]).clamp_min_(1).to(torch.float64)
    share = torch.zeros(steps, len(step), dtype=torch.float64, device=weight.device)
    share.scatter_(1, right[:, None], part[:, None]).scatter_(1, left[:, None], 1 - part[:, None])
    safe = torch.where(weight == 0, 1, weight)
    return share.to(safe) * safe[known] / safe[:, None]


def usable_grids(wanted: tuple[int, ...], steps: int, smooth: bool, fit: bool = False) -> tuple[int, ...]:
    """The numbers of intervals among those wanted that leave out at least half of the timesteps.

    Where noise is added on the way (not smooth) the remainder is rough: there only the finest grid that leaves out
    three fifths is worth its round, for what coarser ones find between their timesteps is wrong by more than what it
    replaces, and none is with fewer than `FEWEST` intervals. fit: the first grid that is too fine is made to fit, if it
    is then finer than the one before by half.
    """
    finest = steps // 2 - 1 if smooth else 2 * steps // 5 - 1
    usable = [count for count in wanted if count <= finest and (smooth or count >= FEWEST)]
    if fit and len(usable) < len(wanted) and 2 * finest >= 3 * max(usable, default=FEWEST):
        usable.append(finest)
    return tuple(usable) if smooth or not usable else (max(usable),)
