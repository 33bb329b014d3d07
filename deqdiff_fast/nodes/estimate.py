"""How far the sample of a round is from the serial chain's, without asking the model again.

Two things are unknown, and both are weighted by what the chain carries of them to the sample, the dual-weighted
residual of adaptive finite elements (Becker and Rannacher 2001, doi 10.1017/S0962492901000010).

*Linearisation.* At every node the model's answer differed from what the secants had foretold, by a surprise; where the
next step is shorter than the last, the next surprise will be too. That foretells how far the next round will move the
sample; with the rounds after it, a geometric series, it is how far this one falls short.

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

    next_step: Tensor  # (B,) how far the next round is foretold to move the sample
    interpolation: Tensor  # (B,)
    step: Tensor  # (B,) how far this round has moved it
    node_surprise: Tensor  # (n, B) parts of the first
    node_roughness: Tensor  # (n, B) parts of the second

    def total(self, before: Estimate | None) -> Tensor:
        """(B,): the estimate of the error; before: of the last round, without which it is Inf.

        What was foretold for this round and what it made of it say by how much the foretelling falls short: the chain
        of the linear model carries errors less far than that of a model which amplifies them.
        """
        if before is None:
            return torch.full_like(self.step, float("inf"))
        short = (self.step / before.next_step).nan_to_num(1.0).clamp_min(1)
        rate = torch.maximum(self.next_step / before.next_step, self.step / before.step)
        return torch.hypot(short * self.next_step / (1 - rate.nan_to_num(0.0).clamp(0, SLOWEST)), self.interpolation)


def estimate(
    grid: NodeGrid, classes: Tensor | None, surprise: Tensor, shrinking: Tensor, remainder: Tensor, sample: Tensor,
    last: Tensor,
) -> Estimate:
    """The estimate of a round.

    Args:
        surprise: (n, B, D), answers less what was foretold at the nodes, when they were last asked.
        shrinking: (n, B), the step from there that was just made against the one that led there.
        remainder: (n, B, D) at the nodes.
        sample, last: (B, D), of this round and of the one before.
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
        (sample - last).norm(dim=1) / size,
        weighted.norm(dim=2) / size,
        rough,
    )
