"""How much further the model carries errors along the chain than slopes say, as far as its answers tell.

Slopes say what a model does with an error on the average; secants, differences of its own answers, know the directions
in which it amplifies, for in those rounds have moved the states. So what interpolation misses is carried from node to
node once more, with the secants' part. By slopes alone its worth to the sample would stay the same from one node to the
next; by what factor it grows there is what the model does beyond them.

Misses are taken as independent, as in the estimate. What neighbours say of a node and it of them is not: where a model
is rough in time, such misses cancel from node to node, and the real ones, between the nodes, do not. So their sum is
taken with some random signs (Hutchinson 1990, doi 10.1080/03610919008812866); the root mean square counts. Where all
timesteps are nodes nothing is missed, and it is the surprises that are carried.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..kernels import node_scan
from .elements import joined
from .history import through
from .node_grid import per_element

if TYPE_CHECKING:
    from .chain import NodeChain

SWEEPS = 5  # of the secants along the nodes: further ones change little
TOGETHER = 200_000  # elements of all nodes, up to which sums are carried at once: launches cost more than memory then
LARGEST = 30.0  # from where on errors are as good as lost


def growth(chain: NodeChain) -> Tensor:
    """(n, B) >= 1: the factor by which an error that begins after each node counts for more than by slopes."""
    signs = chain.grid.signs
    together = signs.shape[1] if chain.problem.host is None and chain.remainder.numel() <= TOGETHER else 1
    carried = [_carried(chain, part) for part in torch.split(signs, together, dim=1)]
    before, new = (reduce(torch.hypot, norms) for norms in zip(*carried))
    limits = torch.finfo(before.dtype)
    gain = torch.where(before > limits.tiny / limits.eps, new / before, 1)
    gain = torch.cat([gain, gain.new_ones(1, gain.shape[1])]).nan_to_num_(1.0, LARGEST).clamp_max_(LARGEST)
    return gain.flip(0).cumprod(0).flip(0).clamp(1, LARGEST)


def _carried(chain: NodeChain, signs: Tensor) -> tuple[Tensor, Tensor]:
    """(n - 1, B) each: the worth to the sample, by slopes, of what the misses have become at the nodes after the first,
    and of the same at the next node; signs: (n, P) of the misses, of which the root sum of squares is taken."""
    grid, problem, rest = chain.grid, chain.problem, chain.remainder
    (count, batch, size), sums = rest.shape, signs.shape[1]
    drift = rest.new_zeros(count, grid.steps.state_coef.shape[1], batch, sums, size)
    leave_one_out = grid.leave_one_out * grid.unasked[:, None]
    for at, classes in _pieces(chain):
        missed = chain.surprise[..., at] if grid.whole else through(leave_one_out, rest[..., at])
        local = (missed * per_element(grid.local, classes))[:, :, None]
        torch.mul(local, signs[:, None, :, None], out=drift[:, 0, ..., at])
    drift = drift.flatten(2, 3)
    moved = rest.new_zeros(count + 1, batch * sums, size)
    extra = torch.zeros_like(moved[1:])
    for sweep in range(SWEEPS + 1):
        if sweep:
            chain.history.carry(moved[:-1], extra)
        node_scan(moved, extra, *grid.steps, classes=problem.classes, drift=drift, backend=problem.backend)
    worth = []
    for at, classes in _pieces(chain):
        after, here = per_element(grid.after, classes), moved[1:, :, at]
        went_on = (here[1:] - drift[1:, 0, :, at]).mul_(after[1:])
        norms = ((here[:-1] * after[:-1]).norm(dim=2), went_on.norm(dim=2))
        worth.append(tuple(norm.view(-1, batch, sums).norm(dim=2) for norm in norms))
    before, new = problem.elements.norms(*joined(worth))
    return before, new


def _pieces(chain: NodeChain) -> Iterator[tuple[slice, Tensor | None]]:
    """Elements to work on one after the other, with their classes."""
    classes = chain.problem.classes
    for at in chain.problem.elements.pieces(chain.states.shape[2]):
        yield at, None if classes is None else classes[at]
