"""How far the sample of a round is from the serial chain's, without asking the model again.

Two things are unknown, and both are weighted by what the chain carries of them to the sample, the dual-weighted
residual of adaptive finite elements (Becker and Rannacher 2001, doi 10.1017/S0962492901000010).

*Linearisation.* At every node the model's answer differed from what the secants had foretold, by a surprise; where the
next step is shorter than the last, the next surprise will be too. That foretells how far the next round will move the
sample; with the rounds after it, a geometric series, it is how far this one falls short. Steps add up as far as they go
on in one direction, which the last two tell; else their squares do.

*Interpolation.* What the neighbours of a node say about it by interpolation misses it by as much as they miss the
timesteps in between, or by more, for those are nearer to them: leave one out. The misses are taken as independent. A
miss counts at least as much as it moves the next state, relative to that: the linear model forgets early errors, which
a network need not do, and once rounds have settled no shortfall shows it.

Both count for more where the model is known to carry errors further than the linear model does, see `growth.growth`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .elements import ALL_ELEMENTS, Elements, joined
from .node_grid import NodeGrid, per_element

FASTEST = 0.05  # of a step, the next one is no shorter: part of it leaves the directions that secants know
SLOWEST = 0.9  # rate of surprises that are not taken to end at all
USUAL = 1.3  # times what was foretold a step is, at least
SKIPPED = 0.03  # part of the tolerance that nodes that are not asked again may cost
PATIENT, STALLED = 8, 0.7  # rounds before which none is too slow; part of the largest estimate of the three before


class Estimate(NamedTuple):
    """Relative L2, against the sample."""

    next_step: Tensor  # (B,) how far the next round is foretold to move the sample
    interpolation: Tensor  # (B,) by the linear model
    grown: Tensor  # (B,) the same, as far as the model is known to carry it
    step: Tensor  # (B,) how far this round has moved it
    along: Tensor  # (B,) the inner product of that and what the round before has done
    node_surprise: Tensor  # (n, B) parts of the first, or what they do to the next state where that is more
    node_roughness: Tensor  # (n, B) parts of the second, each by the same rule
    growth: Tensor  # (B,) the largest of the nodes', 0 where it is not known

    def on_host(self) -> Estimate:
        """The same on the CPU; the one wait for a device in a round."""
        values = torch.cat([value.flatten() for value in self]).cpu()
        parts = torch.split(values, [value.numel() for value in self])
        return Estimate(*(part.view(value.shape) for part, value in zip(parts, self)))

    def missed(self, shortfall: Tensor) -> Tensor:
        """(B,): what interpolation leaves, by the largest shortfall so far or by what the model is known to do."""
        return torch.maximum(shortfall * self.interpolation, self.grown)

    def shortfall(self, before: Estimate) -> Tensor:
        """(B,) >= 1: this round's step against the one that was foretold in the round before.

        The linear model may carry errors less far than the model does, which amplifies them where it decides something.
        """
        return (self.step / before.next_step).nan_to_num(1.0).clamp_min(1)

    def rate(self, before: Estimate) -> Tensor:
        """(B,): by how much a round makes steps shorter, the next one or this one.

        Where surprises stay as they are, and the step was no longer than they had foretold, they may be rounding, that
        moves the sample to and fro; what converges slowly moves it in one direction, and only that adds up.
        """
        made, foretold = self.step / before.step, self.next_step / before.next_step
        stay = (foretold > STALLED) & (self.step <= before.next_step)
        added = (self.along / before.step.square()).clamp_min(0)
        return torch.where(stay, added, torch.maximum(made, foretold)).nan_to_num(0.0)

    def cosine(self, before: Estimate) -> Tensor:
        """(B,) between 0 and 1: how far this round's step has gone on in the direction of the last one."""
        return (self.along / (self.step * before.step)).nan_to_num(1.0).clamp(0, 1)

    def total(self, rate: Tensor, shortfall: Tensor, cosine: Tensor) -> Tensor:
        """(B,): the estimate of the error, by the rate of the rounds, the largest shortfall so far and the cosine of
        one step and the next: the length of the sum of a first-order autoregressive sequence."""
        next_step = torch.maximum(shortfall.clamp_min(USUAL) * self.next_step, FASTEST * self.step)
        rate = rate.clamp(0, SLOWEST)
        series = ((1 + rate * cosine) / ((1 - rate.square()) * (1 - rate * cosine))).sqrt()
        return torch.hypot(next_step * series, self.missed(shortfall))


def estimate(
    grid: NodeGrid, classes: Tensor | None, surprise: Tensor, shrinking: Tensor, remainder: Tensor, states: Tensor,
    last: Tensor, before: Tensor, elements: Elements = ALL_ELEMENTS, growth: Tensor | None = None,
) -> Estimate:  # fmt: skip
    """The estimate of a round.

    Args:
        surprise: (n, B, D), answers less what was foretold at the nodes, when they were last asked.
        shrinking: (n, B), the step from there that was just made against the one that led there.
        remainder: (n, B, D) at the nodes.
        states: (n + 1, B, D), of the nodes and the sample.
        last, before: (B, D), the samples of the two rounds before.
        elements: which D are.
        growth: (n, B), how much further errors are carried than by the linear model; None: no further.
    """
    largest = torch.zeros_like(shrinking[0]) if growth is None else growth.amax(0)
    growth = torch.ones_like(shrinking) if growth is None else growth
    own = joined(
        [
            _lengths(grid, None if classes is None else classes[at], shrinking, growth,
                     surprise[..., at], remainder[..., at], states[..., at], last[..., at])
            for at in elements.pieces(states.shape[2])
        ]
    )  # fmt: skip
    sizes, together, weighted, here, rough, rough_here, step = elements.norms(*own)
    (along,) = elements.sums(((states[-1] - last) * (last - before)).sum(1))
    sizes = sizes.clamp_min(torch.finfo(states.dtype).tiny)
    size, rough = sizes[-1], torch.maximum(rough / sizes[-1], rough_here / sizes[1:])
    return Estimate(
        together / size,
        rough.norm(dim=0),
        (rough * growth).norm(dim=0),
        step / size,
        along / size / size,
        torch.maximum(weighted / size, here / sizes[1:]),
        rough * growth,
        largest,
    )


def stalled(trace: Sequence[float]) -> bool:
    """Whether the estimates of the rounds no longer fall: the last is not clearly below the largest of three before."""
    return len(trace) >= PATIENT and trace[-1] > STALLED * max(trace[-4:-1])


def worth_asking(found: Estimate, before: Estimate | None, scale: Tensor, tol: float) -> Tensor:
    """(n, B) bool: all nodes but those where the next surprise is foretold to count for next to nothing.

    What is foretold of a node that is not asked stays as it is. Where only that is left, all nodes are asked.
    scale: (B,), of what is foretold.
    """
    counts, order = found.node_surprise.sort(0)
    little = counts.cumsum(0) * scale <= SKIPPED * tol
    if before is not None:
        little &= (found.next_step < STALLED * before.next_step) | (found.next_step * scale > tol)
    return torch.zeros_like(little).scatter_(0, order, ~little)


def _lengths(
    grid: NodeGrid, classes: Tensor | None, shrinking: Tensor, growth: Tensor, surprise: Tensor, remainder: Tensor,
    states: Tensor, last: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """L2 over elements: of the states; of the next step of the sample, and each node's part in it; of what that does to
    the next state; of what interpolation misses, in the sample and in the next state; of this step of the sample."""
    weighted, local = surprise * per_element(grid.influence, classes), per_element(grid.local, classes)
    scale = shrinking * growth
    together = torch.bmm(scale.T[:, None], weighted.transpose(0, 1))[:, 0].norm(dim=1)
    parts, here = weighted.norm(dim=2) * scale, torch.mul(surprise, local, out=weighted).norm(dim=2) * shrinking
    missed = torch.mm(grid.leave_one_out, remainder.flatten(1)).view_as(remainder)
    rough_here = torch.mul(missed, local, out=weighted).norm(dim=2) * grid.unasked[:, None]
    rough = missed.mul_(per_element(grid.excess, classes)).norm(dim=2)
    return states.norm(dim=2), together, parts, here, rough, rough_here, (states[-1] - last).norm(dim=1)
