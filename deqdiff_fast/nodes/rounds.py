"""The rounds: ask the model at the nodes, make the chain with what it said, and see how good that is."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..kernels import node_scan
from .drift import composite_drift
from .estimate import Estimate, estimate
from .grid import equidistribute, refine, round_sizes
from .history import NodeHistory
from .node_grid import NodeGrid, Transfer, per_element
from .problem import NodeOutcome, NodeProblem

MAX_ROUNDS, FEWEST_ROUNDS = 12, 5  # a chain that takes more than T / 2, in these bounds, is left to full rounds
SCATTER = 8.0  # estimates are sums over D elements, and scatter by this over sqrt(D)
SKIPPED = 0.03  # part of the tolerance that nodes that are not asked again may cost
UNTOLD = 3  # rounds before which nothing was foretold that could be believed
ROUGH = 0.7  # part of the tolerance that interpolation may leave before there are more nodes
GROWTH = 4  # one node more for so many, and that many at least
DENSEST = 2  # times the usual number of nodes, at most
UNSETTLED = 0.1  # what the last sweep may move where they have not settled
GROWING, LARGEST = 2.0, 3.0  # times the last move of a draft's sweeps, or times the sample: they do not settle
PATIENT, STALLED = 8, 0.7  # rounds before which none is hopeless; part of the estimate three rounds before
SWEEPS, SETTLED = 10, 0.05  # of a draft along the chain, at most, and what part of the tolerance the last may move

Report = Callable[[int, Tensor, "NodeRounds"], object]
"""report(round, error estimate (B,), the rounds): called after every round; returning True stops."""


def most_nodes(steps: int) -> int:
    """How many nodes a round may have."""
    return min(DENSEST * round_sizes(steps)[-1], steps)


class NodeRounds:
    """One solve."""

    def __init__(self, problem: NodeProblem) -> None:
        self.problem, self.steps = problem, len(problem.density)
        self.sizes = round_sizes(self.steps)
        self.batch = problem.start.shape[0]
        self.done, self.draft = [False] * self.batch, problem.draft
        self.evaluated = set[int]()
        self.safety = 1 + SCATTER / problem.start.shape[1] ** 0.5
        self.shortfall = torch.ones(self.batch, dtype=problem.start.dtype, device=problem.start.device)
        self._use(self._grid(equidistribute(problem.density, self.sizes[0])))
        self.remainder = self.states.new_zeros(self.states[1:].shape)
        self._scan(self.remainder, self.states)
        self.history = self._history()
        self.surprise = torch.zeros_like(self.remainder)
        if self.draft is not None:
            self._sweep(None, self.remainder)

    def run(self, limit: int, report: Report | None = None) -> NodeOutcome:
        """Up to `limit` rounds, until all samples are good enough."""
        problem, trace = self.problem, list[Tensor]()
        asked: Tensor | None = None
        stopped = broken = False
        found: Estimate | None = None
        total = torch.full((self.batch,), float("inf"), dtype=torch.float64)
        for round in range(1, min(limit, MAX_ROUNDS, max(self.steps // 2, FEWEST_ROUNDS)) + 1):
            changed = self._change_nodes(round, found)
            asked = None if changed else asked
            self._ask(asked, round)
            before, found = found, self._advance()
            if before is not None and round > UNTOLD + 2 and bool((found.step > GROWING * before.step).any()):
                self.draft = self.history.draft = None  # what it makes of the secants grows
            judged = found.without_refinement(before) if changed and before is not None else found
            latest = self._estimate_error(judged, before if round > UNTOLD else None)
            if asked is not None:  # nothing is new of samples that were not asked about
                latest = torch.where(asked.any(0).cpu() | latest.isnan(), latest, total)
            total = latest
            trace.append(total.nan_to_num(float("inf")))
            if bool(total.isnan().any()):
                broken = True
                break
            self.done = [e <= problem.tol for e in total.tolist()]
            stopped = report is not None and report(round, total, self) is True
            if stopped or all(self.done) or self._hopeless(found, trace):
                break
            asked = self._nodes_to_evaluate(found, before)
        return NodeOutcome(
            self.grid, self.states, self.remainder, self.done, total, trace, len(self.evaluated), stopped, broken
        )

    def _estimate_error(self, found: Estimate, before: Estimate | None) -> Tensor:
        """(B,) float64 on the host: the estimate of the error. The one wait for a device in a round."""
        total = torch.full_like(found.step, float("inf"))
        if before is not None:
            self.shortfall = torch.maximum(self.shortfall, found.shortfall(before))
            total = found.total(before, self.shortfall) * self.safety
        broken = ~(found.step + found.interpolation).isfinite()
        return total.masked_fill(broken, float("nan")).cpu().double()

    def _grid(self, nodes: list[int]) -> NodeGrid:
        like, chain = self.problem.start, self.problem.chain
        make: Callable[[], NodeGrid] = lambda: NodeGrid.of(chain, nodes, like.dtype, like.device)  # noqa: E731
        found: NodeGrid = self.problem.cache(("nodes", tuple(nodes)), make)
        return found

    def _use(self, grid: NodeGrid) -> None:
        problem = self.problem
        self.grid = grid
        self.slope = per_element(grid.slope, problem.classes)
        self.states = problem.start.new_empty(len(grid.nodes) + 1, *problem.start.shape)
        self.states[0] = problem.start
        self.drift = None
        if problem.drift is not None:
            self.drift = composite_drift(problem.chain, problem.classes, grid.nodes, problem.drift)

    def _history(self) -> NodeHistory:
        problem = self.problem
        return NodeHistory(
            problem.history + 1, self.states[1:], problem.ridge, problem.floor, problem.draft is not None
        )

    def _scan(self, remainder: Tensor, out: Tensor) -> None:
        """States that follow from the remainders at the nodes."""
        node_scan(
            out, remainder, *self.grid.steps, classes=self.problem.classes, drift=self.drift,
            backend=self.problem.backend,
        )  # fmt: skip

    def _change_nodes(self, round: int, found: Estimate | None) -> bool:
        """Other nodes for this round, if it wants some; what is known is taken along."""
        nodes = self.grid.nodes
        if round == 1 or found is None:
            return False
        if round <= len(self.sizes):
            wanted = equidistribute(self.problem.density, self.sizes[round - 1])
        elif self._too_rough(found):
            room = most_nodes(self.steps) - len(nodes)
            score = found.node_roughness.amax(1).tolist()
            wanted = refine(list(nodes), score, min(max(GROWTH, len(nodes) // GROWTH), room))
        else:
            return False
        if tuple(wanted) == nodes:
            return False
        self._move(tuple(wanted))
        return True

    def _hopeless(self, found: Estimate, trace: list[Tensor]) -> bool:
        """Whether some sample is no longer getting better, or no number of nodes that is allowed will do for it."""
        scale, tol = self.shortfall * self.safety, self.problem.tol
        settled = (scale * found.next_step <= tol) & (scale * found.interpolation > tol)
        most = len(self.grid.nodes) >= most_nodes(self.steps)
        rough = settled.tolist() if most else [False] * self.batch
        for b, done in enumerate(self.done):
            stalled = len(trace) >= PATIENT and float(trace[-1][b]) > STALLED * float(trace[-4][b])
            if not done and (rough[b] or stalled):
                return True
        return False

    def _too_rough(self, found: Estimate) -> bool:
        """Whether some sample that is not done wants more nodes."""
        rough = (self.shortfall * found.interpolation > ROUGH * self.problem.tol).tolist()
        return any(wanted and not done for wanted, done in zip(rough, self.done))

    def _move(self, nodes: tuple[int, ...]) -> None:
        problem, like, old = self.problem, self.problem.start, self.grid
        make: Callable[[], Transfer] = lambda: Transfer.of(problem.chain, old.nodes, nodes, like.dtype, like.device)  # noqa: E731
        transfer: Transfer = problem.cache(("transfer", old.nodes, nodes), make)
        remainder, before, slope = self.remainder, self.states, self.slope
        self._use(self._grid(list(nodes)))
        node_scan(
            self.states, remainder, *transfer.steps, classes=problem.classes, drift=self.drift, backend=problem.backend
        )
        self.remainder = torch.mm(transfer.scaled, remainder.flatten(1)).view(len(nodes), *like.shape)
        self.history = self.history.moved_to(transfer, before[:-1], self.states[:-1], (slope, self.slope))
        self.surprise = torch.zeros_like(self.remainder)

    def _nodes_to_evaluate(self, found: Estimate, before: Estimate | None) -> Tensor:
        """(n, B) bool: all nodes but those where the next surprise is foretold to count for next to nothing.

        What is foretold of a node that is not asked stays as it is. Where only that is left, all nodes are asked.
        """
        counts, order = found.node_surprise.sort(0)
        scale, tol = self.shortfall * self.safety, self.problem.tol
        little = counts.cumsum(0) * scale <= SKIPPED * tol
        if before is not None:
            little &= (found.next_step < STALLED * before.next_step) | (found.next_step * scale > tol)
        asked = torch.zeros_like(little).scatter_(0, order, ~little)
        return asked & ~torch.tensor(self.done, device=asked.device)

    def _ask(self, asked: Tensor | None, round: int) -> None:
        """The model at the nodes, and by how much it says something else than was foretold."""
        problem, states = self.problem, self.states[:-1]
        answers = torch.empty_like(states)
        problem.ask(states, self.grid.nodes, asked, answers, round)
        self.evaluated.update(self.grid.nodes)
        draft = None if self.draft is None else self.draft(states, self.grid.nodes)
        surprise = answers - self.slope * states - self.remainder
        self.surprise = surprise if asked is None else torch.where(asked[..., None], surprise, self.surprise)
        self.history.push(asked, states, answers, draft)

    def _advance(self) -> Estimate:
        history, last = self.history, self.states[-1].clone()
        history.prepare(self.slope)
        base = history.e[0] - self.slope * history.z[0]
        if self.draft is None:
            self._correct(base, self.remainder)
        else:
            self._sweep(base, self.remainder)
        made = (self.states[:-1] - history.z[0]).norm(dim=2)
        before = history.moved()
        shrinking = torch.where(before > 0, made / before, (made > 0).to(made)).nan_to_num_(1.0).clamp_max_(1.0)
        return estimate(self.grid, self.problem.classes, self.surprise, shrinking, self.remainder, self.states, last)

    def _correct(self, base: Tensor, out: Tensor) -> None:
        self._scan(base, self.states)  # by the slopes, then once more with what the secants add along it
        self.history.correct(base, self.states[:-1], out)
        self._scan(out, self.states)

    def _sweep(self, base: Tensor | None, out: Tensor) -> None:
        """The chain of the draft, corrected by what the model said: base, None for nothing; out <- its remainders.

        Then once more with what the secants add along it; in every sweep they would feed on themselves.
        """
        if not self._settle(base, None, out):
            self._give_up_draft(base, out)
        elif base is not None:
            states, remainder, extra = self.states.clone(), out.clone(), torch.empty_like(out)
            self.history.correct(torch.zeros_like(out), states[:-1], extra)
            if not self._settle(base, extra, out):
                self.states.copy_(states), out.copy_(remainder)

    def _settle(self, base: Tensor | None, extra: Tensor | None, out: Tensor) -> bool:
        """Sweeps of the draft over all nodes at once, until they move the sample no more; whether they have settled."""
        assert self.draft is not None
        moved = float("inf")
        for _ in range(SWEEPS):
            states, last = self.states[:-1], self.states[-1].clone()
            torch.sub(self.draft(states, self.grid.nodes), self.slope * states, out=out)
            if base is not None and self.history.draft is not None:
                out.add_(self.history.e[0]).sub_(self.history.draft[0])
            if extra is not None:
                out.add_(extra)
            self._scan(out, self.states)
            before, moved = moved, float(((self.states[-1] - last).norm(dim=1) / self.states[-1].norm(dim=1)).max())
            if not moved <= min(GROWING * before, LARGEST):
                return False
            if moved <= SETTLED * self.problem.tol:
                return True
        return base is None or moved <= UNSETTLED

    def _give_up_draft(self, base: Tensor | None, out: Tensor) -> None:
        """Go on without a draft whose chain cannot be made by sweeps, with the slopes in its place."""
        self.draft = self.history.draft = None
        if base is None:
            out.zero_()
            self._scan(out, self.states)
        else:
            self.history.prepare(self.slope)
            self._correct(base, out)
