"""The chain at some nodes: what the model said there, and the states that follow from it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..kernels import node_scan
from .draft_answers import DraftAnswers
from .drift import composite_drift
from .guess import spread_gap
from .history import History, NodeHistory, through
from .host_history import HostHistory
from .node_grid import NodeGrid, Transfer, per_element
from .problem import NodeProblem

UNSETTLED = 0.1  # what the last sweep of a draft may move where they have not settled
GROWING, LARGEST = 2.0, 3.0  # times the last move of a draft's sweeps, or times the sample: they do not settle
SWEEPS, SETTLED = 10, 0.1  # of a draft along the chain, at most, and what part of the tolerance the last may move,
LOOSE = 0.2  # or of what the round before has moved, if that is more: the next one moves that much again
STILL = 0.03  # of what the last sweep may move: a state that has moved less since the draft was asked about it


class NodeChain:
    """The nodes of a round, with states (n + 1, B, D), the last one the sample, and remainders (n, B, D).

    Args:
        nodes: those of the first round. Nothing is known of the model: the chain is the draft's, or made of slopes,
            or leads to the guess of the sample, if there is one.
    """

    def __init__(self, problem: NodeProblem, nodes: list[int]) -> None:
        self.problem, self.draft = problem, problem.draft
        self.answers: DraftAnswers | None = None
        self._use(self._grid(nodes))
        self.remainder = self.states.new_zeros(self.states[1:].shape)
        self._scan(self.remainder, self.states)
        kept = (problem.history + 1, self.states[1:], problem.ridge, problem.floor)
        self.history: History
        if problem.host is None:
            self.history = NodeHistory(*kept, problem.draft is not None, problem.elements, problem.backend)
        else:
            self.history = HostHistory(*kept, problem.elements, problem.host, problem.backend)
        self.surprise = torch.zeros_like(self.remainder)
        self.moved = 1.0  # relative, by the sweeps of the last round
        if problem.guess is not None:
            shape = problem.guess.shape.to(self.states)[self.grid.at]
            last = self.states[-1]
            self.remainder = spread_gap(problem.guess, shape, self.grid.influence, problem.classes, last)
            self._scan(self.remainder, self.states)
        elif self.draft is not None:
            self._sweep(self.remainder)

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
        self.answers = None if self.draft is None else DraftAnswers(self.draft, grid.at, problem.start.shape[0])
        if problem.drift is not None:
            kinds, device = problem.classes, problem.start.device
            self.drift = composite_drift(problem.chain, kinds, grid.nodes, problem.drift, device)

    def _scan(self, remainder: Tensor, out: Tensor) -> None:
        """States that follow from the remainders at the nodes."""
        node_scan(
            out, remainder, *self.grid.steps, classes=self.problem.classes, drift=self.drift,
            backend=self.problem.backend,
        )  # fmt: skip

    def move(self, nodes: tuple[int, ...]) -> None:
        """Go on with other nodes, and take along what is known."""
        problem, like, old = self.problem, self.problem.start, self.grid
        make: Callable[[], Transfer] = lambda: Transfer.of(problem.chain, old.nodes, nodes, like.dtype, like.device)  # noqa: E731
        transfer: Transfer = problem.cache(("transfer", old.nodes, nodes), make)
        remainder, before = self.remainder, self.states
        self._use(self._grid(list(nodes)))
        node_scan(
            self.states, remainder, *transfer.steps, classes=problem.classes, drift=self.drift, backend=problem.backend
        )
        self.remainder = through(transfer.scaled, remainder)
        self.history = self.history.moved_to(transfer, before[:-1], self.states[:-1])
        self.surprise = torch.zeros_like(self.remainder)

    def learn(self, at: Tensor | None, answers: Tensor) -> None:
        """What the model said at the nodes, (n, B, D), written to; at: (r,) int64 in which of n B rows, None: all."""
        states = self.states[:-1]
        off = None if self.answers is None else answers - self.answers.at(states, STILL * SETTLED * self.problem.tol)[0]
        remainder = answers.addcmul_(self.slope, states, value=-1)
        surprise = torch.sub(remainder, self.remainder, out=self.remainder)  # which the chain is about to replace
        asked = None
        if at is not None:
            asked = torch.zeros_like(self.history.count, dtype=torch.bool)
            asked.view(-1).index_fill_(0, at, True)
        self.remainder, before = self.surprise, self.surprise  # scratch
        self.surprise = surprise if asked is None else torch.where(asked[..., None], surprise, before)
        if self.history.guess_error is None:  # 0 where the model was not asked
            (error,) = self.problem.elements.norms(self.surprise.norm(dim=2))
            self.history.guess_error = error if asked is None else error * asked
        self.history.push(asked, states, remainder, off)

    def advance(self) -> Tensor:
        """The chain with what is known now. Returns (n, B): the step at each node against the last one, at most 1."""
        history = self.history
        history.prepare()
        if self.draft is None:
            self._correct(self.remainder)
        else:
            self._sweep(self.remainder, history.off)
        made, before = self.problem.elements.norms(history.distance(self.states[:-1]), history.moved())
        return torch.where(before > 0, made / before, (made > 0).to(made)).nan_to_num_(1.0).clamp_max_(1.0)

    def _correct(self, out: Tensor) -> None:
        base = self.history.base()
        self._scan(base, self.states)  # by the slopes, then once more with what the secants add along it
        self.history.correct(base, self.states[:-1], out)
        self._scan(out, self.states)

    def _sweep(self, out: Tensor, off: list[Tensor] | None = None) -> None:
        """The chain of the draft, corrected by what the model said other than the draft, off[0]; out <- its remainders.

        Then once more with what the secants add along it; in every sweep they would feed on themselves.
        """
        last = self.states[-1].clone()
        if not self._settle(None if off is None else off[0], out):
            self._give_up_draft(out, off is not None)
        elif off is not None:
            self.moved = float(self._moved_from(last).max())
            states, remainder, extra = self.states.clone(), out.clone(), torch.empty_like(out)
            self.history.correct(off[0], states[:-1], extra)
            if not self._settle(extra, out):
                self.states.copy_(states), out.copy_(remainder)

    def _moved_from(self, last: Tensor) -> Tensor:
        """(B,): by how much each sample has moved, relative."""
        return torch.div((self.states[-1] - last).norm(dim=1), self.states[-1].norm(dim=1))

    def _settle(self, extra: Tensor | None, out: Tensor) -> bool:
        """Sweeps of the draft over all nodes at once, until they move no sample more; whether they have settled.

        extra: (n, B, D), beside what the draft says; None at first, when nothing is known of the model.
        """
        assert self.answers is not None
        moved, bound, wanted = float("inf"), max(SETTLED * self.problem.tol, LOOSE * self.moved), None
        for _ in range(SWEEPS):
            last = self.states[-1].clone()
            said, there = self.answers.at(self.states[:-1], STILL * bound, wanted)
            torch.addcmul(said, self.slope, there, value=-1, out=out)
            if extra is not None:
                out.add_(extra)
            self._scan(out, self.states)
            each = self._moved_from(last)
            wanted, before, moved = each > bound, moved, float(each.max())
            if not moved <= min(GROWING * before, LARGEST):
                return False
            if moved <= bound:
                return True
        return extra is None or moved <= UNSETTLED

    def _give_up_draft(self, out: Tensor, told: bool) -> None:
        """Go on without a draft whose sweeps do not settle, by slopes; told: whether the model has said anything."""
        self.forget_draft()
        if told:
            self.history.prepare()
            self._correct(out)
        else:
            out.zero_()
            self._scan(out, self.states)

    def forget_draft(self) -> None:
        """Go on without a draft."""
        self.draft = self.answers = self.history.off = None
