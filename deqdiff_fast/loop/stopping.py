"""The stopping rule: which rows are final, when a sample ends, and which samples have stalled.

A row that moved by r in this round and by p in the one before, relative to its size, contracts by rho = r / p, and if
it goes on like that it has r rho / (1 - rho) left to go (Aitken's extrapolation). Early rows of a chain contract fast:
there a row is as good as final while its last step was still long. A row that contracts slowly is not, however short
its steps. Even so, where a sample hangs on a choice that early timesteps make, what little they are off decides it.
Such a sample stalls: from one round to the next its steps do not get shorter.

On a device `kernels.mark_converged` and `kernels.advance_window` decide the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import advance_window, mark_converged
from ..kernels.stopping import MAX_RATE, TINY_OF
from .base import Chain, Solver
from .device_state import DeviceState
from .window import Window

HELD = 1.01  # times `finish`: the step of a sample that is not to end


@dataclass(frozen=True)
class StoppingRule:
    """When rows and samples are done. All lengths are relative L2, of a row's step against its new state.

    Attributes:
        freeze: what a row may have left to go to be final while later ones are not.
        finish: the step below which all rows must be for a sample to end.
        floor: a step that is rounding, and final as it is.
        by_step: rows are judged by their last step alone.
    """

    freeze: float
    finish: float
    floor: float = 0.0
    by_step: bool = False

    def mark_converged(self, chain: Chain, previous: Tensor, strict: Tensor) -> None:
        """Bring sq_diff / sq_norm to at most freeze^2 where a row is final, and above it where it is not, in place.

        Args:
            previous: (T, B), squared relative steps of the round before, NaN where there is none; replaced.
            strict: (B,), how much tighter a sample's rows are held.
        """
        if self.by_step:
            reset_steps(previous)
        mark_converged(
            chain.sq_diff, chain.sq_norm, previous, strict, self.freeze, self.floor, backend=chain.backend
        )  # fmt: skip

    def hold(self, chain: Chain, samples: Tensor) -> None:
        """Keep samples from ending in the first round after a guess that was near, unless all their rows are final.

        One short step tells nothing of the next one: a model that amplifies errors where the guess was made without it
        takes longer steps afterwards. The last row of such a sample counts as one that has moved by more than `finish`.

        Args:
            samples: (B,) bool.
        """
        longest = (chain.sq_diff / chain.sq_norm.clamp_min(TINY_OF[chain.sq_norm.dtype])).amax(0)
        least = (HELD * self.finish) ** 2 * (samples & (longest > self.freeze**2)) * chain.sq_norm[-1]
        torch.maximum(chain.sq_diff[-1], least, out=chain.sq_diff[-1])

    def advance(self, window: Window, residual: list[list[float]]) -> list[float]:
        """Slide a window past what has converged; residual[b][i], Inf from a broken row on.

        Row lo[b] was evaluated at a final state, so it is final now whatever its residual. Where it moved by more than
        `freeze`, the rows after it were evaluated at a state that is out of date, and their residuals say nothing: none
        of them is final. Else a row is final when its residual is at most `freeze` and all rows before it are final: an
        error that is frozen early is carried along and may grow, so `freeze` is strict. All rows up to the sample are
        final when none, the first included, is above `finish`: what is left in them shrinks in the last step once more.

        Returns:
            The longest step of each sample in this round.
        """
        worst = [0.0] * len(window.lo)
        for b, (lo, hi) in enumerate(zip(window.lo, window.hi)):
            if lo == window.num_steps:
                continue
            found, front = residual[b], lo
            while front < hi and found[front] <= self.freeze:
                front += 1
            front, worst[b] = max(front, lo + 1), max(found[lo:hi])
            if hi == window.num_steps and worst[b] <= self.finish:
                front = window.num_steps
            window.lo[b], window.hi[b] = front, min(window.num_steps, front + window.width)
        return worst

    def advance_on_device(self, chain: Chain, state: DeviceState) -> None:
        """The same without a look at the device: `chain.lo`, `chain.hi` and `state` <- the next window."""
        advance_window(
            chain.sq_diff, chain.sq_norm, chain.lo, chain.hi, state.previous_bounds, state.decision, state.rows,
            self.freeze, self.finish, chain.window, backend=chain.backend,
        )  # fmt: skip


def reset_steps(previous: Tensor) -> None:
    """No row has moved yet."""
    previous.fill_(math.nan)


def relative_steps(chain: Chain) -> Tensor:
    """(T, B): the length of every row's last step, relative to its new state."""
    return (chain.sq_diff / chain.sq_norm.clamp_min(TINY_OF[chain.sq_norm.dtype])).sqrt_()


class StallDetector:
    """Detects stalled samples (largest step above 0.9 times that of the round before); reports each at most once.

    Their rows are to be made active again from the first one on, and held to `strict` times `freeze`.
    """

    def __init__(self, batch: int, solver: Solver, smallest: float) -> None:
        """smallest: step below which nothing counts as a stall."""
        self.strict = 1.0 if solver.strict is None else solver.strict
        self.smallest, self.reported = smallest, [solver.strict is None] * batch
        self.last = [float("inf")] * batch

    def update(self, worst: list[float]) -> list[int]:
        """The samples that have stalled. worst: the longest relative step of each sample's rows in this round."""
        found = [
            b
            for b, (now, before) in enumerate(zip(worst, self.last))
            if not self.reported[b] and self.smallest < now < float("inf") and now > MAX_RATE * before
        ]
        for b in found:
            self.reported[b] = True
        self.last = list(worst)
        return found
