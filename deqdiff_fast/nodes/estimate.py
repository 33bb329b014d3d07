"""How far the sample of a round is from the serial chain's, without asking the model again.

Two things are unknown, and both are weighted by what the chain carries of them to the sample, the dual-weighted
residual of adaptive finite elements (Becker and Rannacher 2001, doi 10.1017/S0962492901000010).

*Linearisation.* At every node the model's answer differed from what the secants had foretold, by a surprise; where the
next step is shorter than the last, the next surprise will be too. Summed over what further rounds would still find
(a geometric series), that is how far this round's step falls short.

*Interpolation.* What the neighbours of a node say about it by interpolation misses it by as much as they miss the
timesteps in between, or by more, for those are nearer to them: leave one out. The misses are taken as independent.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .node_grid import NodeGrid, per_element

SLOWEST = 0.9  # rate of surprises that are not taken to end at all


class Estimate(NamedTuple):
    """Relative L2, against the sample."""

    linearisation: Tensor  # (B,) before the series
    interpolation: Tensor  # (B,)
    node_surprise: Tensor  # (n, B) parts of the first
    node_roughness: Tensor  # (n, B) parts of the second

    def total(self, before: Tensor) -> Tensor:
        """(B,): the estimate of the error; before: (B,), `linearisation` of the last round, Inf where there is none."""
        rate = (self.linearisation / before).clamp(0, SLOWEST)
        tail = self.linearisation / (1 - rate)
        known = before.isfinite()
        return torch.where(known, torch.hypot(tail, self.interpolation), float("inf"))


def estimate(
    grid: NodeGrid, classes: Tensor | None, surprise: Tensor, shrinking: Tensor, remainder: Tensor, sample: Tensor
) -> Estimate:
    """The estimate of a round.

    Args:
        surprise: (n, B, D), answers less what was foretold at the nodes, when they were last asked.
        shrinking: (n, B), the step from there that was just made against the one that led there.
        remainder: (n, B, D) at the nodes.
        sample: (B, D).
    """
    size = sample.norm(dim=1).clamp_min(torch.finfo(sample.dtype).tiny)
    weighted = surprise * per_element(grid.influence, classes)
    weighted *= shrinking[..., None]
    missed = torch.mm(grid.leave_one_out, remainder.flatten(1)).view_as(remainder)
    missed *= per_element(grid.excess, classes)
    rough = missed.norm(dim=2) / size
    return Estimate(
        weighted.sum(0).norm(dim=1) / size,
        rough.norm(dim=0),
        weighted.norm(dim=2) / size,
        rough,
    )
