"""How many rounds a solve takes: a formula fitted to measurements, corrected by every solve that was made."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..nodes.grid import DENSEST
from ..nodes.rounds import UNTOLD
from ..plan import RoundEstimate

# Fitted to quasi-Newton solves to a relative error of TRUSTED_TOL, deterministic DDIM, one sample: the bundled image
# model, a small policy and a Gaussian mixture, T = 20, 50, 100 and 1000. Their means are within 15 % of the formula,
# and each model within a fifth of the means. What counts is the window's share of the chain.
EVALUATIONS, EXPONENT, FEWEST = 3.7, 0.25, 1.2  # evaluations per timestep: 3.7 share^0.25, at least 1.2
EMPTYING = 0.7  # rows of a mean round, as a part of the window: 1 / (1 + 0.7 share)
WHOLE = RoundEstimate(6.4, 2.7)  # all timesteps in every round
PER_DECADE = 1.3  # evaluations beyond the first, for one more digit of the sample
PER_DOUBLING = 1.05  # rounds for twice the samples: the slowest of a batch decides
TRUSTED_TOL = 1e-2
# Of rounds on nodes, the bundled model, T = 20 to 1000: within 7 % of the measured evaluations, 13 % with a draft.
# Stricter tolerances: a Gaussian mixture, down to 1e-5.
NODE_ROUNDS, PER_TENFOLD = 5.0, 0.9  # for 20 timesteps, and for ten times as many
DRAFTED_ROUNDS = 4.0  # with a draft of the model, whatever T
ASKED = 0.8  # part of the nodes that is asked once some can be skipped
ROUNDS_PER_DECADE, NODES_PER_DECADE = 1.0, 1.25  # more rounds, and times as many nodes, for one more digit
FULL_ROUNDS = 2.0  # on all timesteps after those on nodes, where these do not suffice
NEWEST = 0.3  # weight of the newest measurement in every running average: three or four solves decide


class Expectation:
    """Rounds and evaluations of a solve with a given window, for one schedule and tolerance.

    A solve corrects the formula for solves of its kind (all timesteps or a window, batch, warm) fully, and for kinds
    never tried, of those that begin with rounds on nodes as it does or does not, by the mean of all corrections so far.

    Args:
        num_steps: T.
        tol: relative error allowed in the sample.
        drafted: whether there is a draft.
        nodes: numbers of them in the first rounds, where solves of all timesteps are made by rounds on nodes, unless
            they are warm.
        certify: whether rounds on all timesteps follow them in any case.
    """

    def __init__(
        self, num_steps: int, tol: float = TRUSTED_TOL, drafted: bool = False, nodes: Sequence[int] = (),
        certify: bool = False,
    ) -> None:  # fmt: skip
        self.num_steps, self.drafted, self.nodes, self.certify = num_steps, drafted, nodes, certify
        self.decades = math.log10(TRUSTED_TOL / min(max(tol, 1e-8), 1.0))
        self._corrections: dict[tuple[bool, int, bool], RoundEstimate] = {}  # factors on the formula
        self._general = dict.fromkeys((False, True), RoundEstimate(1.0, 1.0))  # for kinds never tried, by `_on_nodes`

    def prior(self, window: int, batch: int = 1, warm: bool = False) -> RoundEstimate:
        """What the formula says; T rounds for a window of 1."""
        steps, width = self.num_steps, min(window, self.num_steps)
        if width <= 1:
            return RoundEstimate(steps, 1.0)
        slowest = PER_DOUBLING ** math.log2(max(batch, 1))
        if self._on_nodes(window, warm):
            return self._prior_on_nodes(slowest)
        share = width / steps
        evaluations, active = max(EVALUATIONS * share**EXPONENT, FEWEST), 1 / (1 + EMPTYING * share)
        if width == steps:
            evaluations, active = WHOLE.evaluations, WHOLE.evaluations / WHOLE.rounds
        evaluations = min(max(1 + (evaluations - 1) * PER_DECADE**self.decades, 1.0), width)
        rounds = max(evaluations / (share * active), 1 / share, 2.0) * slowest
        return RoundEstimate(min(rounds, steps), evaluations)

    def _on_nodes(self, window: int, warm: bool) -> bool:
        return bool(self.nodes) and window >= self.num_steps and not warm

    def _prior_on_nodes(self, slowest: float) -> RoundEstimate:
        """Rounds on nodes: a few on fewer of them, then on as many as the tolerance wants, less what is skipped."""
        steps, (*first, last) = self.num_steps, self.nodes
        rounds = DRAFTED_ROUNDS if self.drafted else NODE_ROUNDS + PER_TENFOLD * math.log10(steps / 20)
        rounds = max((rounds + ROUNDS_PER_DECADE * self.decades) * slowest, UNTOLD + 1.0)
        growth = NODES_PER_DECADE**self.decades
        nodes = min(last * min(max(growth, 1 / DENSEST), DENSEST), steps)
        full = max(UNTOLD - len(first), 0)
        rows = sum(first) + nodes * (full + ASKED * (rounds - len(first) - full))
        if self.certify:
            rounds, rows = rounds + FULL_ROUNDS, rows + FULL_ROUNDS * steps
        rounds = min(rounds, float(steps))
        return RoundEstimate(rounds, min(rows / steps, rounds))

    def __call__(self, window: int, batch: int = 1, warm: bool = False) -> RoundEstimate:
        """What to expect; warm: the solve starts from a trajectory given by the caller."""
        prior, steps = self.prior(window, batch, warm), self.num_steps
        if min(window, steps) <= 1:
            return prior
        on_nodes = self._on_nodes(window, warm)
        factor = self._corrections.get((window >= steps, batch, warm), self._general[on_nodes])
        rounds = min(max(prior.rounds * factor.rounds, 1.0, steps / window), float(steps))
        least = rounds / steps if on_nodes else 1.0
        return RoundEstimate(rounds, min(max(prior.evaluations * factor.evaluations, least), float(window) * rounds))

    def learn(self, window: int, batch: int, taken: RoundEstimate, warm: bool = False) -> None:
        """Correct by a solve of that kind that took so many rounds and evaluations."""
        prior, key = self.prior(window, batch, warm), (window >= self.num_steps, batch, warm)
        ratio = RoundEstimate(taken.rounds / prior.rounds, taken.evaluations / prior.evaluations)
        self._corrections[key] = _average(self._corrections.get(key, ratio), ratio)
        if not warm:
            on_nodes = self._on_nodes(window, warm)
            self._general[on_nodes] = _average(self._general[on_nodes], ratio)


def average(old: float, new: float) -> float:
    """Running average."""
    return old + NEWEST * (new - old)


def _average(old: RoundEstimate, new: RoundEstimate) -> RoundEstimate:
    return RoundEstimate(*map(average, old, new))
