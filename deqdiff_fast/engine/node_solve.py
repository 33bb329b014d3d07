"""Rounds on nodes as the first part of a solve, or the whole of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..loop.base import Chain
from ..loop.task import Replay
from ..loop.window import Window
from ..model.row_tables import rough_in_time
from ..nodes.composite import interpolation
from ..nodes.grid import FEWEST_STEPS
from ..nodes.problem import NodeOutcome, Spots
from ..nodes.rounds import UNTOLD, NodeRounds
from ..nodes.suspects import passed_over
from ..solution import Solution, Stats
from .checked_timesteps import CheckedTimesteps
from .initial_guess import linear_scan
from .node_problem import node_problem
from .options import Options
from .placement import Placement
from .sample_guess import sample_guess
from .system import System
from .workspace import Workspace

if TYPE_CHECKING:
    from .solve import Request

RoundReport = Callable[[int, Window, Tensor], object]

MOST_LAGS = 2  # of a chain: what is further back would be extrapolated between nodes


def begins_on_nodes(options: Options, window: int, warm: bool) -> bool:
    """Whether a solve with that window begins with rounds on nodes; warm: it is given a trajectory.

    Without a slope the linear model carries errors as no denoiser does, and the estimate of them would be false.
    """
    schedule, solver = options.schedule, options.solver
    suitable = schedule.num_steps >= FEWEST_STEPS and schedule.lags <= MOST_LAGS and solver.slope is not None
    suitable = suitable and (options.drafted or not rough_in_time(options.model))
    return solver.nodes and suitable and not warm and window >= schedule.num_steps and options.round_limit() > UNTOLD


def without_other_states(request: Request, options: Options) -> Request:
    """The same request; of a trajectory that starts at other noises only the sample is kept, as a guess, where there
    are rounds on nodes: what a model decides between two neighbours is seen there, by how far their states differ.
    """
    states, noise = request.init_trajectory, request.noise
    if states is None or not begins_on_nodes(options, options.first_window, warm=False):
        return request
    off, size = ((x.flatten(1).norm(dim=1)) for x in (states[0] - noise, noise))
    other = bool((off > options.floor(noise.dtype) * size).any())
    return replace(request, init=states[-1], init_trajectory=None) if other else request


class NodeSolve:
    """The rounds on nodes of one solve.

    Args:
        made: a chain that was begun already, whose noise is taken over.
        checked: what is known of the model in time.
    """

    def __init__(
        self, system: System, options: Options, request: Request, made: Chain | None, checked: CheckedTimesteps
    ) -> None:
        self.system = system
        self.certify_all = options.certify == "full" or request.return_trajectory
        self.place = Placement.of(system, options)
        self.lease = options.memory.lease(self.place.plan(), system.device)
        noise, solver, tol = request.noise, options.solver, options.allowed(request.noise.dtype)
        self.checked = checked
        spots = Spots() if self.certify_all else checked.spots(tol, system.batch)
        with torch.no_grad():
            self.problem = node_problem(
                self.place, self.lease, noise, request.generator, tol, solver, options.backend, made, spots
            )  # fmt: skip
            if request.init is not None:
                guess = sample_guess(system, self.problem.chain, request.init)
                self.problem.guess = guess._replace(sample=self.place.own(guess.sample))
        self.outcome: NodeOutcome | None = None

    def run(self, limit: int, report: RoundReport | None = None, work: Workspace | None = None) -> None:
        """Make the rounds.

        Args:
            report: called after every round with its number, a window and the estimate of the error.
            work: where the chain is filled in after every round, for `report` to look at.
        """
        watch = None
        if report is not None:
            told, steps, batch = report, self.system.num_steps, self.system.batch

            def watch(round: int, error: Tensor, rounds: NodeRounds) -> object:
                if work is not None:
                    self._fill(work, rounds.chain.grid.nodes, rounds.chain.remainder)
                window = Window(steps, batch, steps)
                if all(rounds.done) and not self.certify_all:  # before that a sample may turn out to be none
                    window.lo = [steps] * batch
                return told(round, window, error)

        with torch.no_grad():
            rounds = NodeRounds(self.problem)
            self.outcome = rounds.run(limit, watch)
            hidden = passed_over(self.problem, self.outcome, rounds.suspects)
        self.checked.learn(self.problem.spots, self.outcome, self.problem.tol, hidden)

    @property
    def usable(self) -> bool:
        """Whether the rounds have left states that others can begin with."""
        return self.outcome is not None and not self.outcome.broken

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return self.usable and not self.certify_all and all(self._outcome.done)

    @property
    def final(self) -> list[bool]:
        """Which samples are done."""
        return [done and not self.certify_all for done in self._outcome.done]

    @property
    def doubted(self) -> list[bool]:
        """Which samples are not done, whose states are a guess."""
        return [not done for done in self._outcome.done]

    @property
    def stopped(self) -> bool:
        """Whether `report` asked for the end."""
        return self.outcome is not None and self.outcome.stopped

    @property
    def rounds(self) -> int:
        """How many were made."""
        return 0 if self.outcome is None else len(self.outcome.trace)

    @property
    def _outcome(self) -> NodeOutcome:
        assert self.outcome is not None
        return self.outcome

    def fill(self, work: Workspace) -> None:
        """States and predictions of all timesteps, from what the rounds have found."""
        self._fill(work, self._outcome.grid.nodes, self._outcome.remainder)

    def restart(self, work: Workspace, replay: Replay) -> None:
        """Begin anew with the noise of this solve: nothing that was found is of use, nor a guess of the sample."""
        self._begin(work)
        work.guess(None, replay)

    def _begin(self, work: Workspace) -> None:
        chain, problem = work.chain, self.problem
        chain.states[0].copy_(self.place.whole(problem.start))
        chain.sq_diff.zero_(), chain.sq_norm.zero_()
        if chain.drift is not None and problem.drift is not None:
            chain.drift.copy_(self.place.whole(problem.drift))

    def _fill(self, work: Workspace, nodes: tuple[int, ...], remainder: Tensor) -> None:
        self._begin(work)
        chain, problem = work.chain, self.problem
        make: Callable[[], Tensor] = lambda: interpolation(  # noqa: E731
            problem.chain, torch.tensor(nodes), torch.arange(chain.num_steps)
        ).to(chain.states)
        weights: Tensor = problem.cache(("all", nodes), make)
        torch.mm(weights, self.place.whole(remainder).flatten(1), out=chain.predictions.flatten(1))
        linear_scan(chain, chain.slope, torch.zeros_like(chain.lo), torch.full_like(chain.hi, chain.num_steps))
        chain.predictions.addcmul_(chain.slope[:, None], chain.states[:-1])

    def note(self, stats: Stats, more: bool) -> list[Tensor]:
        """What was done, into the statistics; more: rounds on all timesteps followed. Returns the trace."""
        outcome = self._outcome
        stats.rounds, stats.node_rounds = max(stats.rounds, self.rounds), self.rounds
        stats.check_evals = outcome.check_evals
        if more and self.usable:  # samples that were done took no part in those
            final = torch.tensor(self.final)
            stats.error_estimate = torch.where(final, outcome.error_estimate, stats.error_estimate)
        if not more:
            stats.error_estimate = outcome.error_estimate
            stats.timesteps_evaluated = outcome.evaluated / self.system.num_steps
        return outcome.trace

    def solution(self, stats: Stats, started: float) -> Solution:
        """What the rounds on nodes alone have found."""
        system, trace = self.system, self.note(stats, more=False)
        stats.residual_trace = torch.stack(trace)
        stats.model_evals, stats.model_calls = system.model_evals, system.model_calls
        stats.draft_evals = 0 if system.draft is None else system.draft.evals
        sample = system.from_basis(self.place.whole(self._outcome.states[-1])).view(system.batch, *system.shape)
        self.lease.release()
        stats.wall_seconds = time.perf_counter() - started
        return Solution(sample.to(system.model_dtype), torch.ones(system.batch, dtype=torch.bool), stats)
