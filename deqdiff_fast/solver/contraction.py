"""How far a timestep still has to go, judged by how fast it comes: what decides which rows are final.

A row that moved by r in this round and by p in the one before contracts by rho = r / p, and if it goes on like that it
has r rho / (1 - rho) left to go (Aitken). Early rows of a chain contract fast: there a row is as good as final while
its last step was still long. A row that creeps is not, however short its steps.

Even so, where a sample hangs on a choice that early timesteps make, what little they are off decides it. Such a sample
shows: from one round to the next its steps do not get shorter. `Vigil` notices, and has its rows taken up again from
the first one on and held much tighter.
"""

from __future__ import annotations

import torch
from torch import Tensor

TINY = 1e-30  # keeps 0 / 0 a zero residual; Inf / Inf and NaN stay NaN
FASTEST, SLOWEST, FIRST = 0.1, 0.9, 0.5  # bounds of rho, and what a row's first step is worth


def forget(previous: Tensor) -> None:
    """No row has moved yet."""
    previous.fill_(float("nan"))


def judge(
    sq_diff: Tensor, sq_norm: Tensor, previous: Tensor, freeze: float, floor: float, strict: Tensor | float = 1.0
) -> None:
    """Bring sq_diff / sq_norm to at most freeze^2 where a row is final, and above it where it is not, in place.

    sq_diff, sq_norm: (T, B), squared step and size. A row is final when no more than `freeze * strict` is left to go,
    relative to its size, or when it moved by no more than `floor`, the rounding. previous: (T, B), the squared relative
    steps of the round before, replaced by this round's. strict: (B,). Where a row is not final and its step is above
    2 `freeze`, and where a step is not finite, nothing changes.
    """
    step = sq_diff / sq_norm.clamp_min(TINY)
    rho = (step / previous).nan_to_num_(FIRST**2, SLOWEST**2).clamp_(FASTEST**2, SLOWEST**2).sqrt_()
    left = step * (rho / (1 - rho)).square_()
    final = (left <= (freeze * strict) ** 2) | (step <= floor**2)
    previous.copy_(step)
    step = torch.where(final, step.clamp_max(freeze**2), step.clamp_min((2 * freeze) ** 2))
    sq_diff.copy_(step * sq_norm.clamp_min(TINY))


class Vigil:
    """Looks out for samples whose steps do not get shorter. Each is named once."""

    def __init__(self, batch: int, solver: object, above: float) -> None:
        """solver.strict: what part of `freeze` a named sample's rows are held to, or None: no vigil. above: smallest
        step that counts."""
        strict: float | None = getattr(solver, "strict", None)
        self.strict = 1.0 if strict is None else strict
        self.above, self.named = above, [strict is None] * batch
        self.last = [float("inf")] * batch

    def look(self, worst: list[float]) -> list[int]:
        """The samples to be taken up again. worst: the longest relative step of each sample's rows in this round."""
        found = [
            b
            for b, (now, before) in enumerate(zip(worst, self.last))
            if not self.named[b] and self.above < now < float("inf") and now > SLOWEST * before
        ]
        for b in found:
            self.named[b] = True
        self.last = list(worst)
        return found
