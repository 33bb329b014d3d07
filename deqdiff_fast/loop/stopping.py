"""How far a timestep still has to go, judged by how fast it comes: what decides which rows are final.

A row that moved by r in this round and by p in the one before contracts by rho = r / p, and if it goes on like that it
has r rho / (1 - rho) left to go (Aitken). Early rows of a chain contract fast: there a row is as good as final while
its last step was still long. A row that creeps is not, however short its steps.

Even so, where a sample hangs on a choice that early timesteps make, what little they are off decides it. Such a sample
shows: from one round to the next its steps do not get shorter. `StallDetector` notices, and has its rows taken up again from
the first one on and held much tighter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import judge_steps
from ..kernels.judge_steps import SLOWEST

TINY = 1e-30  # keeps 0 / 0 a zero residual; Inf / Inf and NaN stay NaN


def forget(previous: Tensor) -> None:
    """No row has moved yet."""
    previous.fill_(float("nan"))


def judge(
    sq_diff: Tensor, sq_norm: Tensor, previous: Tensor, freeze: float, floor: float, strict: Tensor | None = None,
    backend: str = "auto",
) -> None:  # fmt: skip
    """Bring sq_diff / sq_norm to at most freeze^2 where a row is final, and above it where it is not, in place; see
    `kernels.judge_steps`. strict: (B,), all 1 if None."""
    strict = torch.ones_like(sq_diff[0]) if strict is None else strict
    judge_steps(sq_diff, sq_norm, previous, strict, freeze, floor, backend=backend)


class StallDetector:
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
