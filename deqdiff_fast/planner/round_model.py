"""How many rounds a solve takes: a table of what was measured, corrected by every solve that is seen."""

from __future__ import annotations

import math
from bisect import bisect_left

from ..plan import RoundEstimate

# Of quasi-Newton solves to a relative error of 1e-2, deterministic DDIM, one sample: the bundled image model, a small
# policy and a Gaussian mixture, T = 20, 50, 100 and 1000, all within a fifth of these. What counts is the window's
# share of the chain: evaluations per timestep, and the rows of a mean round as a part of the window.
SHARES = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.0)
EVALUATIONS = (1.2, 1.45, 1.6, 1.85, 2.15, 2.6, 3.25, 3.8)
ACTIVE = (1.0, 1.0, 1.0, 0.98, 0.95, 0.83, 0.68, 0.58)
WHOLE = 2.7, 0.42  # the same of all timesteps at once, which begins on coarse grids
DRAFTED = 1.8, 0.53  # and with a draft: the bundled model and its own
PER_DECADE = 1.3  # evaluations beyond the first, for one more digit of the sample
PER_DOUBLING = 1.05  # rounds for twice the samples: the slowest of a batch decides
FORGET = 0.3  # weight of the newest solve in the running averages
TRUSTED_TOL = 1e-2


class Expectation:
    """Rounds and evaluations of a solve with a given window, for one schedule and tolerance.

    num_steps: T. tol: relative error allowed in the sample. drafted: there is a draft. A solve that was seen corrects
    the table for its own window fully, and for windows never tried by the mean of all corrections so far.
    """

    def __init__(self, num_steps: int, tol: float = TRUSTED_TOL, drafted: bool = False) -> None:
        self.num_steps, self.whole = num_steps, DRAFTED if drafted else WHOLE
        self.strictness = PER_DECADE ** math.log10(TRUSTED_TOL / min(max(tol, 1e-8), 1.0))
        self._seen: dict[tuple[int, int, bool], RoundEstimate] = {}  # corrections: factors on the table
        self._general = RoundEstimate(1.0, 1.0)

    def prior(self, window: int, batch: int = 1) -> RoundEstimate:
        """The table's figures, T for a window of 1."""
        steps, width = self.num_steps, min(window, self.num_steps)
        if width <= 1:
            return RoundEstimate(steps, 1.0)
        share = width / steps
        evaluations, active = _between(share, EVALUATIONS), _between(share, ACTIVE)
        if width == steps:
            evaluations, active = self.whole
        evaluations = 1 + (evaluations - 1) * self.strictness
        evaluations = min(max(evaluations, 1.0), width)
        rounds = max(evaluations / (share * active), steps / width, 2.0)
        rounds *= PER_DOUBLING ** math.log2(max(batch, 1))
        return RoundEstimate(min(rounds, steps), evaluations)

    def __call__(self, window: int, batch: int = 1, warm: bool = False) -> RoundEstimate:
        """What to expect; warm: the solve starts from a trajectory given by the caller."""
        guess = self.prior(window, batch)
        if min(window, self.num_steps) <= 1:
            return guess
        factor = self._seen.get((window, batch, warm)) or self._general
        rounds = min(max(guess.rounds * factor.rounds, 1.0), float(self.num_steps))
        return RoundEstimate(rounds, min(max(guess.evaluations * factor.evaluations, 1.0), float(window) * rounds))

    def learn(self, window: int, batch: int, seen: RoundEstimate, warm: bool = False) -> None:
        """A solve took `seen`."""
        guess, key = self.prior(window, batch), (window, batch, warm)
        ratio = RoundEstimate(seen.rounds / guess.rounds, seen.evaluations / guess.evaluations)
        self._seen[key] = _mix(self._seen.get(key, ratio), ratio)
        if not warm:
            self._general = _mix(self._general, ratio)


def _mix(old: RoundEstimate, new: RoundEstimate) -> RoundEstimate:
    return RoundEstimate(*(a + FORGET * (b - a) for a, b in zip(old, new)))


def _between(share: float, values: tuple[float, ...]) -> float:
    """Linear in log(share) between the table's shares, constant outside of them."""
    k = bisect_left(SHARES, share)
    if k == 0 or k == len(SHARES):
        return values[0] if k == 0 else values[-1]
    low, high = math.log(SHARES[k - 1]), math.log(SHARES[k])
    part = (math.log(share) - low) / (high - low)
    return values[k - 1] + part * (values[k] - values[k - 1])
