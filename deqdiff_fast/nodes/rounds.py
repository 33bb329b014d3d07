"""The rounds: ask the model at the nodes, make the chain with what it said, and see how good that is."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .chain import NodeChain
from .estimate import Estimate, estimate, stalled, worth_asking
from .grid import equidistribute, refine, round_sizes, tilted, usual_nodes, walk_between
from .growth import growth
from .problem import NodeOutcome, NodeProblem
from .spots import missed_at, spots_along
from .suspects import suspects

MAX_ROUNDS, FEWEST_ROUNDS = 20, 5  # a chain that takes more than T / 2, in these bounds, is left to full rounds
MARGIN, SCATTER = 1.05, 8.0  # of estimates, sums over D elements: they scatter by that, and by this over sqrt(D)
NOISE_FACTOR = 1.5  # times the estimate, where a draft goes through a chain that adds much noise: it scatters there
UNTOLD = 3  # rounds before which nothing was foretold that could be believed
DOUBTED = 0.15  # of the sample: how far the model may carry an error of the tolerance
ROUGH = 0.7  # part of the tolerance that interpolation may leave before there are more nodes
SPOT_FACTOR, SPOT_SLACK = 1.5, 0.3  # times the estimate of interpolation, and part of the tolerance more, in spots
SMOOTH, NOT_SMOOTH = 4, 2  # powers of the number of nodes by which misses fall, at first and where that proves wrong
STEP_PART, AT_ONCE = 0.02, 1.5  # of the next step, as which misses fall; times T: from there on all are nodes at once
GROWTH = 4  # one node more for so many, and that many at least
GROWING = 2.0  # times the last step: a draft makes rounds diverge
NEARLY_ALL = 0.9  # of the timesteps as nodes: rounds on all of them cost no more, for they leave out what is final
LARGEST_FALL = 30.0  # times the tolerance: from there no single round leads to the end
LARGEST_ESTIMATE = 3.0  # one that says nothing, times the sample

Report = Callable[[int, Tensor, "NodeRounds"], object]
"""report(round, error estimate (B,), the rounds): called after every round; returning True stops."""


class NodeRounds:
    """One solve."""

    def __init__(self, problem: NodeProblem) -> None:
        self.problem, self.sizes, self.steps = problem, problem.sizes, len(problem.density)
        self.batch = problem.start.shape[0]
        self.done, self.hopeless = [False] * self.batch, [False] * self.batch
        self.rough: bool | None = None  # as far as spots have shown
        self.evaluated, self.check_evals = set[int](), 0
        self.safety = MARGIN + SCATTER / problem.elements.numel(problem.start.shape[1]) ** 0.5
        if problem.drift is not None and problem.draft is not None and self.sizes[-1] == self.steps:
            self.safety *= NOISE_FACTOR
        self.unsure = torch.full((self.batch,), problem.amplifies)
        self.unchanged = 0  # rounds since nodes have changed
        self.shortfall = torch.ones(self.batch, dtype=problem.start.dtype)
        self.amplified = torch.ones_like(self.shortfall)  # what is missed, at any nodes: at new ones little is known
        self.rate: Tensor | None = None
        self.missed: Tensor | None = None  # by interpolation, as spots have just shown
        self.suspects: tuple[int, ...] = ()  # spots that are asked again, until states have settled
        self.off = False  # whether those that were just asked miss too much
        self.density = problem.density
        self.chain = NodeChain(problem, self._even_nodes(self.sizes[0]))
        self.last = self.chain.states[-1].clone(), self.chain.states[-1].clone()  # samples of the rounds before

    def _even_nodes(self, count: int) -> list[int]:
        """So many that share out the density; by that of the problem they are known from earlier solves."""
        make: Callable[[], list[int]] = lambda: equidistribute(self.density, count)  # noqa: E731
        return make() if self.density is not self.problem.density else self.problem.cache(("even", count), make)

    def run(self, limit: int, report: Report | None = None) -> NodeOutcome:
        """Up to `limit` rounds, until all samples are good enough."""
        chain, trace, stopped, broken = self.chain, list[Tensor](), False, False
        found: Estimate | None = None
        worth = torch.ones(len(chain.grid.nodes), self.batch, dtype=torch.bool)
        total = torch.full((self.batch,), float("inf"), dtype=torch.float64)
        for round in range(1, min(limit, MAX_ROUNDS, max(self.steps // 2, FEWEST_ROUNDS)) + 1):
            changed = self._change_nodes(round, found)
            self.unchanged = 0 if changed else self.unchanged + 1
            if changed:  # all of them but the noise, which stays as it is
                worth = torch.ones(len(chain.grid.nodes), self.batch, dtype=torch.bool)
                worth[0] = False
            wanted = worth & self._open()
            asked = None if bool(wanted.all()) else wanted
            self._ask(asked, round)
            before, found = found, self._advance(round).on_host()
            if self._seems_done(found):
                found = self._estimate(growth(chain)).on_host()
                self.amplified = torch.maximum(self.amplified, (found.grown / found.interpolation).nan_to_num(1.0))
            found = found._replace(grown=torch.maximum(found.grown, self.amplified * found.interpolation))
            self.unsure |= found.growth * self.problem.tol >= DOUBTED
            grown = before is not None and bool((found.step > GROWING * before.step).any())
            if grown and chain.draft is not None and round > UNTOLD + 2:
                chain.forget_draft()  # what it makes of the secants grows
            latest = self._estimate_error(found, before if round > UNTOLD else None, changed)
            if asked is not None:  # nothing is new of samples that were not asked about
                latest = torch.where(asked.any(0) | latest.isnan(), latest, total)
            total = latest
            trace.append(total.nan_to_num(float("inf")))
            if bool(total.isnan().any()):
                broken = True
                break
            self._note_done(trace)
            stopped = report is not None and report(round, total, self) is True
            self._note_hopeless(found, trace)
            if stopped or self.rough or not bool(self._open().any()):
                break
            worth = worth_asking(found, before, self.shortfall * self.safety, self.problem.tol)
        return NodeOutcome(
            chain.grid, chain.states, chain.remainder, self.done, total, trace, len(self.evaluated), stopped, broken,
            self.rough, self.check_evals,
        )  # fmt: skip

    def _change_nodes(self, round: int, found: Estimate | None) -> bool:
        """Other nodes for this round, if it wants some; what is known is taken along."""
        nodes = self.chain.grid.nodes
        if round == 1 or found is None:
            return False
        if round == 2 and self.sizes[-1] < usual_nodes(self.steps) and found.interpolation.max() > LARGEST_ESTIMATE:
            self.sizes = round_sizes(self.steps)  # too rough for fewer, whatever the tolerance
        if round <= len(self.sizes):
            if round == len(self.sizes):
                self.density = tilted(self.density, nodes, found.node_roughness.amax(1).tolist())
            wanted = self._even_nodes(self.sizes[round - 1])
        elif self._too_rough(found):
            wanted = self._more_nodes(found)
        else:
            return False
        if changed := tuple(wanted) != nodes:
            self.chain.move(tuple(wanted))
        return changed

    def _more_nodes(self, found: Estimate) -> list[int]:
        """As many nodes as seem to do, or a few more where that is not more; all timesteps if they are nearly all."""
        nodes, wanting, allowed = self.chain.grid.nodes, self._open(), ROUGH * self.problem.tol
        count, missed = len(nodes), found.missed(self.shortfall)
        if self.problem.drift is None:
            left = float((self.safety * missed / (allowed + STEP_PART * found.next_step))[wanting].max())
            smooth = count <= self.sizes[-1] and count * left ** (1 / NOT_SMOOTH) < AT_ONCE * self.steps
            wanted = int(count * left ** (1 / (SMOOTH if smooth else NOT_SMOOTH)))
        else:  # what noise does between nodes is missed as a random walk is
            wanted, enough = count, walk_between(self.steps, count) * allowed / float(missed[wanting].max())
            while wanted < self.problem.most and walk_between(self.steps, wanted) > enough:
                wanted += 1
        wanted = min(max(wanted, count + max(GROWTH, count // GROWTH)), self.problem.most)
        if self.problem.drift is None and wanted >= NEARLY_ALL * self.steps:
            return list(range(self.steps))
        return refine(list(nodes), found.node_roughness.amax(1).tolist(), wanted - count)

    def _ask(self, asked: Tensor | None, round: int) -> None:
        """The model at the nodes, and by how much it says something else than was foretold; once, at spots as well, and
        at those of them that are suspect in every round."""
        problem, chain, batch = self.problem, self.chain, self.batch
        nodes, device = chain.grid.nodes, problem.start.device
        states = chain.states[:-1].flatten(0, 1)
        rows = torch.tensor(nodes)[:, None] * batch + torch.arange(batch)
        slots = torch.arange(rows.numel()).view(rows.shape)
        rows, slots = (rows.flatten(), slots.flatten()) if asked is None else (rows[asked], slots[asked])
        first = round == len(self.sizes)
        wanted = problem.spots if first else problem.spots._replace(timesteps=self.suspects)
        spots = spots_along(chain, wanted) if first or self.suspects else None
        if spots is not None:
            other = torch.tensor(spots.timesteps) * batch + problem.spots.sample
            rows, slots = torch.cat([rows, other]), torch.cat([slots, len(states) + torch.arange(len(other))])
            states = torch.cat([states, spots.states.flatten(0, 1)])
            self.evaluated.update(spots.timesteps)
            self.check_evals += len(spots.timesteps)
        rows, slots = torch.stack([rows, slots]).to(device).unbind()
        answers = torch.empty_like(states)
        problem.ask(states, rows, slots, answers, round)
        self.evaluated.update(nodes)
        count = len(nodes) * batch
        chain.learn(None if asked is None else slots[: int(asked.sum())], answers[:count].view_as(chain.remainder))
        if spots is not None:
            said = answers[count:].view_as(spots.states)
            self.missed = missed_at(spots, chain, said)
            if first:
                self.suspects = tuple(sorted({*problem.spots.again, *suspects(spots, chain, said)}))

    def _advance(self, round: int) -> Estimate:
        """The chain with what is known now, and how good it is; how far errors are carried, where nodes are chosen."""
        self.last = self.chain.states[-1].clone(), self.last[0]
        self.shrinking = self.chain.advance()
        counts = self.chain.draft is None and round == max(len(self.sizes), UNTOLD)
        return self._estimate(growth(self.chain) if counts else None)

    def _estimate(self, grown: Tensor | None) -> Estimate:
        """How good the chain is, by how much further than the linear model the model carries errors, (n, B)."""
        chain, problem = self.chain, self.problem
        return estimate(
            chain.grid, problem.classes, chain.surprise, self.shrinking, chain.remainder, chain.states, *self.last,
            problem.elements, grown,
        )  # fmt: skip

    def _seems_done(self, found: Estimate) -> bool:
        """Whether it is not known yet how far the model carries errors, and some sample would be good enough."""
        if self.chain.draft is not None or bool((found.growth > 0).any()):
            return False
        near = self.shortfall * self.safety * torch.hypot(found.next_step, found.interpolation) <= self.problem.tol
        return bool((near & self._open()).any())

    def _estimate_error(self, found: Estimate, before: Estimate | None, changed: bool) -> Tensor:
        """(B,) float64: the estimate of the error.

        changed: whether there are other nodes than in the round before: what interpolation had missed there makes this
        step, and the next one, no measure of how fast rounds converge.
        """
        total = torch.full_like(found.step, float("inf"))
        if before is not None:
            if not changed or self.rate is None:
                self.shortfall = torch.maximum(self.shortfall, found.shortfall(before))
                self.rate = found.rate(before)
            total = found.total(self.rate, self.shortfall, found.cosine(before)) * self.safety
        total = total.masked_fill(~(found.step + found.interpolation).isfinite(), float("nan"))
        expected = SPOT_FACTOR * float(found.interpolation[self.problem.spots.sample]) + SPOT_SLACK * self.problem.tol
        self.off = self.missed is not None and not float(self.missed) <= expected
        self.rough = self.off if self.missed is not None and self.rough is None else self.rough
        self.missed = None
        return total.double()

    def _note_done(self, trace: list[Tensor]) -> None:
        """Which samples are good enough. Sudden estimates, and any where models amplify, count the second time only."""
        tol, last, first = self.problem.tol, trace[:-1][-1:] or trace, len(trace) == UNTOLD + 1
        most = torch.where(self.unsure, tol, float("inf") if first else LARGEST_FALL * tol)
        sure = torch.tensor(self.done) | ((last[-1] <= most) & ~torch.tensor(self.hopeless))
        self.done = ((trace[-1] <= tol) & sure).tolist()
        if self.suspects and self.off and self.done[self.problem.spots.sample]:
            self.rough, self.done = True, [False] * self.batch

    def _note_hopeless(self, found: Estimate, trace: list[Tensor]) -> None:
        """Which samples are left to rounds on all timesteps.

        Those that do not get better, but for rounds in which what other nodes had missed shows, see `_estimate_error`;
        those for which no number of nodes that is allowed will do: where the chain adds noise on its way, that is
        foretold on the first grid of the usual size and in the round after it. And those whose estimate was larger than
        the sample once: the model decides something there, and what errors it amplifies is not told.
        """
        scale, tol = self.shortfall * self.safety, self.problem.tol
        settled = (scale * found.next_step <= tol) & (self.safety * found.missed(self.shortfall) > tol)
        rough = (settled & (len(self.chain.grid.nodes) >= self.problem.most)).tolist()
        drafted = self.chain.draft is not None and self.sizes[-1] == self.steps
        if self.problem.drift is not None and not drafted and 0 <= len(trace) - len(self.sizes) <= 1:
            rough = self._too_noisy(found)
        for b, done in enumerate(self.done):
            slow = self.unchanged > 1 and stalled([float(estimates[b]) for estimates in trace])
            diverged = len(trace) > UNTOLD and float(trace[-1][b]) > LARGEST_ESTIMATE
            self.hopeless[b] = self.hopeless[b] or (not done and (rough[b] or slow or diverged))

    def _too_noisy(self, found: Estimate) -> list[bool]:
        """For which samples as many nodes as there may be would leave too much of what the noise of every step does."""
        nodes, most = len(self.chain.grid.nodes), min(self.problem.most, int(NEARLY_ALL * self.steps))
        if nodes >= most:
            return [nodes >= NEARLY_ALL * self.steps] * self.batch
        left = walk_between(self.steps, most) / walk_between(self.steps, nodes)
        return (found.interpolation * left > ROUGH * self.problem.tol).tolist()

    def _too_rough(self, found: Estimate) -> bool:
        """Whether some sample that is neither done nor hopeless wants more nodes."""
        scale = max(1.0, ROUGH * self.safety)  # for else it may be that alone what is above tol
        rough = scale * found.missed(self.shortfall) > ROUGH * self.problem.tol
        return bool((rough & self._open()).any())

    def _open(self) -> Tensor:
        """(B,) bool: for which samples rounds on nodes go on."""
        return ~(torch.tensor(self.done) | torch.tensor(self.hopeless))
