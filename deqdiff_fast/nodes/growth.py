"""How much further the model carries errors along the chain than slopes say, as far as its answers tell.

Slopes say what a model does with an error on the average; secants, differences of its own answers, know the directions
in which it amplifies, for in those rounds have moved the states. So what interpolation misses is carried from node to
node once more, all of it at once, with the secants' part. By slopes alone its worth to the sample would stay the same
from one node to the next; by what factor it grows there is what the model does beyond them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..kernels import node_scan
from .elements import joined
from .node_grid import per_element

if TYPE_CHECKING:
    from .chain import NodeChain

SWEEPS = 5  # of the secants along the nodes: further ones change little
LARGEST = 30.0  # from where on errors are as good as lost


def growth(chain: NodeChain) -> Tensor:
    """(n, B) >= 1: the factor by which an error that begins after each node counts for more than by slopes."""
    grid, problem, rest = chain.grid, chain.problem, chain.remainder
    drift = rest.new_zeros(len(rest), grid.steps.state_coef.shape[1], *rest.shape[1:])
    leave_one_out = grid.leave_one_out * grid.unasked[:, None]
    for at, classes in _pieces(chain):
        missed = torch.mm(leave_one_out, rest[..., at].flatten(1)).view_as(rest[..., at])
        torch.mul(missed, per_element(grid.local, classes), out=drift[:, 0, :, at])
    moved, extra = torch.zeros_like(chain.states), torch.zeros_like(rest)
    for sweep in range(SWEEPS + 1):
        if sweep:
            chain.history.carry(moved[:-1], extra)
        node_scan(moved, extra, *grid.steps, classes=problem.classes, drift=drift, backend=problem.backend)
    worth = []
    for at, classes in _pieces(chain):
        after, here = per_element(grid.after, classes), moved[1:, :, at]
        went_on = (here[1:] - drift[1:, 0, :, at]).mul_(after[1:])
        worth.append(((here[:-1] * after[:-1]).norm(dim=2), went_on.norm(dim=2)))
    before, new = problem.elements.norms(*joined(worth))
    limits = torch.finfo(before.dtype)
    gain = torch.where(before > limits.tiny / limits.eps, new / before, 1)
    gain = torch.cat([gain, gain.new_ones(1, gain.shape[1])]).nan_to_num_(1.0, LARGEST).clamp_max_(LARGEST)
    return gain.flip(0).cumprod(0).flip(0).clamp(1, LARGEST)


def _pieces(chain: NodeChain) -> Iterator[tuple[slice, Tensor | None]]:
    """Elements to work on one after the other, with their classes."""
    classes = chain.problem.classes
    for at in chain.problem.elements.pieces(chain.states.shape[2]):
        yield at, None if classes is None else classes[at]
