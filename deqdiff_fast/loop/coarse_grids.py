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
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .._types import Rows
from .base import Chain
from .stopping import TINY
from .task import Evaluate, Play, run_eager
from .window import Window

LONG = 256  # timesteps of a long chain
ROUGH = 8  # the fewest intervals of a grid on a chain that adds noise


class PartialSolver(Protocol):
    """A solver that can make a step from predictions of which some were never asked of the model.

    With a method `draft_predictions(chain, memory) -> (T, B, D)`, that is what R is the remainder of, in place of c X; with
    `snap_to_anchors(chain, wanted)`, that says which timesteps are asked in the place of those wanted.
    """

    def step_interpolated(self, chain: Chain, memory: Any, round: int, evaluated: Tensor) -> None: ...


class Keep(Protocol):
    """`cache.cached` for the chain's schedule."""

    def __call__(self, key: Hashable, make: Callable[[], Grid]) -> Grid: ...


def make_anew(key: Hashable, make: Callable[[], Grid]) -> Grid:
    """Keeps nothing."""
    return make()


class Grid(NamedTuple):
    """What one coarse round evaluates; everything lies on the device already, so that no round waits for it."""

    rows: Rows
    at: Tensor  # (n,) int64, the timesteps
    evaluated: Tensor  # (T,) bool, where they are
    share: Tensor  # (T, n), see `interpolation`


class CoarseRounds:
    """The rounds on coarse grids that come before the loop; the window is the whole chain."""

    def __init__(
        self,
        chain: Chain,
        solver: PartialSolver,
        memory: Any,
        rest: Tensor,
        weight: Tensor,
        intervals: tuple[int, ...],
        keep: Keep = make_anew,
    ) -> None:
        """rest: (1 + the largest of intervals, B, D) scratch. weight: (T,) q_i, see above. intervals: see `grid_sizes`.
        keep: remembers what follows from the weight."""
        self.chain, self.solver, self.memory, self.rest, self.keep = chain, solver, memory, rest, keep
        made = {count: self._grid(count, weight) for count in intervals}
        self.grids = [made[count] for count in intervals]
        self.residuals = torch.empty(len(intervals), chain.batch, dtype=chain.sq_diff.dtype, device=chain.lo.device)
        self.trace: list[Tensor] = []

    def _grid(self, intervals: int, weight: Tensor) -> Grid:
        chain, steps, device = self.chain, self.chain.num_steps, self.chain.states.device
        ask = getattr(self.solver, "snap_to_anchors", lambda chain, wanted: wanted)
        step: list[int] = ask(chain, grid(steps, intervals))

        def make() -> Grid:
            at = torch.tensor(step, device=device)
            flat = (at[:, None] * chain.batch + torch.arange(chain.batch, device=device)).flatten()
            rows = Rows(flat, step[0], step[-1] + 1, len(flat))
            evaluated = torch.zeros(steps, dtype=torch.bool, device=device).index_fill_(0, at, True)
            return Grid(rows, at, evaluated, interpolation(step, steps, weight).to(self.rest))

        return self.keep(("grid", tuple(step), chain.batch, device, self.rest.dtype), make)

    def run(
        self, evaluate: Evaluate, report: Callable[[int, Window, Tensor], object] | None, play: Play = run_eager
    ) -> bool:
        """Make the rounds; `report` as for `iterate`, or None where nobody watches. Returns whether it asks to stop.

        The residuals, (B,) each, are in `trace` until the next run.
        """
        chain, self.trace = self.chain, []
        chain.lo.fill_(0), chain.hi.fill_(chain.num_steps)
        window = Window(chain.num_steps, chain.batch, chain.window)
        for round, place in enumerate(self.grids, 1):
            evaluate(place.rows, round)
            play(("coarse", round), partial(self._advance, place, round))
            self.trace.append(self.residuals[round - 1])
            if report is not None and report(round, window, self.trace[-1].cpu()) is True:
                return True
        return False

    def _advance(self, place: Grid, round: int) -> None:
        chain = self.chain
        self._fill(place)
        self.solver.step_interpolated(chain, self.memory, round, place.evaluated)
        torch.amax((chain.sq_diff / chain.sq_norm.clamp_min(TINY)).sqrt_(), 0, out=self.residuals[round - 1])

    def _fill(self, place: Grid) -> None:
        """Predictions of every row from those of the grid."""
        chain, rest = self.chain, self.rest[: len(place.at)]
        draft_predictions = getattr(self.solver, "draft_predictions", None)
        known = None if draft_predictions is None else draft_predictions(chain, self.memory)
        torch.index_select(chain.predictions, 0, place.at, out=rest)
        if known is None:
            rest.addcmul_(chain.slope[place.at, None], chain.states[place.at], value=-1)
        else:
            rest.sub_(known[place.at])
        rest.nan_to_num_(0.0, 0.0, 0.0)  # what the model has failed on is for the full rounds to find and to report
        torch.mm(place.share, rest.flatten(1), out=chain.predictions.flatten(1))
        if known is None:
            chain.predictions.addcmul_(chain.slope[:, None], chain.states[:-1])
        else:
            chain.predictions.add_(known)


def without_coarse(solver: Any) -> Any:
    """The same solver, all of whose rounds are full."""
    return replace(solver, coarse=())


def grid(steps: int, intervals: int) -> list[int]:
    """The distinct timesteps nearest to 0, ..., steps - 1 in equal parts; doubling the parts keeps the old ones."""
    return sorted({round(k * (steps - 1) / intervals) for k in range(intervals + 1)})


def interpolation(step: list[int], steps: int, weight: Tensor) -> Tensor:
    """(steps, n): the shares of n timesteps, the first and the last of the chain among them, in every timestep; linear
    between neighbours in what was multiplied by weight: (steps,), where that is not 0; like the weight."""
    known, row = torch.tensor(step, device=weight.device), torch.arange(steps, device=weight.device)
    left = (torch.searchsorted(known, row, right=True) - 1).clamp_max_(max(len(step) - 2, 0))
    right = (left + 1).clamp_max_(len(step) - 1)
    part = (row - known[left]) / (known[right] - known[left]).clamp_min_(1).to(torch.float64)
    share = torch.zeros(steps, len(step), dtype=torch.float64, device=weight.device)
    share.scatter_(1, right[:, None], part[:, None]).scatter_(1, left[:, None], 1 - part[:, None])
    safe = torch.where(weight == 0, 1, weight)
    return share.to(safe) * safe[known] / safe[:, None]


def grid_sizes(solver: Any, steps: int, window: int, stochastic: bool) -> tuple[int, ...]:
    """The numbers of intervals of the grids, one round each, that a solver asks for on a chain of that many steps.

    Those of `solver.coarse` that leave out at least half of the timesteps. Where noise is added on the way the
    remainder is rough: there only the finest grid that leaves out three fifths is worth its round, for what coarser
    ones find between their timesteps is wrong by more than what it replaces, and none is with fewer than `ROUGH`
    intervals. None where a window slides, or where `solver.coarse` is empty.

    With a draft, the first grid that is too fine is made to fit, if it is then finer than the one before by half; and
    a long chain, for which further grids cost little, has grids of its own, several where it adds noise too: what a
    draft leaves of a prediction follows the noise less.
    """
    if window < steps or not getattr(solver, "coarse", ()):
        return ()
    drafted = hasattr(solver, "draft_predictions")
    long = drafted and steps >= LONG
    smooth = long or not stochastic
    name = "coarse" if not long else "coarse_noisy" if stochastic else "coarse_long"
    wanted: tuple[int, ...] = getattr(solver, name, ())
    finest = steps // 2 - 1 if smooth else 2 * steps // 5 - 1
    usable = [count for count in wanted if count <= finest and (smooth or count >= ROUGH)]
    if drafted and len(usable) < len(wanted) and 2 * finest >= 3 * max(usable, default=ROUGH):
        usable.append(finest)
    return tuple(usable) if smooth or not usable else (max(usable),)
