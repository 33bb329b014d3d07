"""Whether a model is as smooth in time as interpolation between nodes takes it to be.

Spots are timesteps between the nodes at which the model is asked too, about one sample, in the same call. What it says
there is compared with what its answers at the nodes say by interpolation; what that misses, carried to the sample by
the chain and added up over every interval, is the error that the estimate takes leave-one-out for. A guidance interval,
a second expert or a hook at some timestep shows here, and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import node_scan
from .chain import NodeChain
from .composite import LinearChain
from .drift import composite_drift
from .elements import joined
from .node_grid import Transfer, per_element
from .problem import Spots


@dataclass(frozen=True)
class SpotTables:
    """m spots between given nodes."""

    targets: tuple[int, ...]  # the nodes and the spots: composite steps are no longer than from node to node
    transfer: Transfer  # to these
    among: Tensor  # (m,) int64, where the spots are among these
    slope: Tensor  # (m, K) of the prediction in the state
    influence: Tensor  # (m, K) d sample / d remainder, times the timesteps that a spot stands for
    local: Tensor  # (m, K) d state of the next timestep / d remainder, times those
    interval: Tensor  # (m,) int64, the node before each

    @classmethod
    def of(
        cls, chain: LinearChain, nodes: tuple[int, ...], spots: tuple[int, ...], dtype: torch.dtype,
        device: torch.device,
    ) -> SpotTables:  # fmt: skip
        at, known = torch.tensor(spots), torch.tensor([*nodes, len(chain.unit)])
        interval = torch.searchsorted(known, at, right=True) - 1
        share = (known.diff()[interval] - 1) / interval.bincount(minlength=len(nodes))[interval]
        own = chain.influence[at]
        slope, local = chain.slope[at], chain.model_coef[at, :1].expand_as(own)
        slope, far, near = (t.to(device, dtype) for t in (slope, own * share[:, None], local * share[:, None]))
        targets = tuple(sorted({*nodes, *spots}))
        among = torch.tensor([targets.index(k) for k in spots], device=device)
        transfer = Transfer.of(chain, nodes, targets, dtype, device)
        return cls(targets, transfer, among, slope, far, near, interval.to(device))


class SpotStates(NamedTuple):
    """The spots of one round that are no nodes of it."""

    timesteps: tuple[int, ...]
    tables: SpotTables
    states: Tensor  # (m, 1, D) there, by the chain as it is


def spots_along(chain: NodeChain, wanted: Spots) -> SpotStates | None:
    """What of the wanted spots there is besides the nodes, None if nothing."""
    problem, nodes, sample = chain.problem, chain.grid.nodes, wanted.sample
    spots = tuple(k for k in wanted.timesteps if k not in set(nodes))
    if not spots:
        return None
    like = problem.start[sample : sample + 1]
    tables = SpotTables.of(problem.chain, nodes, spots, like.dtype, like.device)
    drift = None
    if problem.drift is not None:
        own = problem.drift[:, sample : sample + 1]
        drift = composite_drift(problem.chain, problem.classes, tables.targets, own, like.device)
    states = like.new_empty(len(tables.targets) + 1, *like.shape)
    states[0] = like
    node_scan(
        states, chain.remainder[:, sample : sample + 1].contiguous(), *tables.transfer.steps, classes=problem.classes,
        drift=drift, backend=problem.backend,
    )  # fmt: skip
    return SpotStates(spots, tables, states[tables.among])


def missed_at(spots: SpotStates, chain: NodeChain, answers: Tensor) -> Tensor:
    """(): relative error of the sample by what interpolation misses of the answers at the spots, (m, 1, D).

    By the rule of `estimate.estimate`: an interval counts at least as much as it moves the state at its end.
    """
    problem, which = chain.problem, slice(chain.problem.spots.sample, chain.problem.spots.sample + 1)
    known, states = chain.history.base()[:, which], chain.states[:, which]
    own = joined(
        [
            _carried(spots.tables, None if problem.classes is None else problem.classes[at], answers[..., at],
                     spots.states[..., at], known[..., at], states[..., at])
            for at in problem.elements.pieces(states.shape[2])
        ]
    )  # fmt: skip
    far, near, sizes = problem.elements.norms(*own)
    missed: Tensor = torch.maximum(far / sizes[-1], near / sizes[1:]).norm()
    return missed


def remainder_at(tables: SpotTables, classes: Tensor | None, answers: Tensor, there: Tensor) -> Tensor:
    """(m, 1, D), of the answers at the spots."""
    return answers - per_element(tables.slope, classes) * there


def _carried(
    tables: SpotTables, classes: Tensor | None, answers: Tensor, there: Tensor, known: Tensor, states: Tensor
) -> tuple[Tensor, ...]:  # fmt: skip
    """L2 over elements of what interpolation misses, carried to the sample and to the next node's state, by intervals;
    and of the states. known: (n, 1, D) remainders at the nodes. there: (m, 1, D) states at the spots."""
    found = remainder_at(tables, classes, answers, there)
    found -= torch.mm(tables.transfer.scaled[tables.among], known.flatten(1)).view_as(found)
    into = found.new_zeros(len(known), *found.shape[1:])
    far = into.index_add(0, tables.interval, found * per_element(tables.influence, classes)).norm(dim=2)
    near = into.index_add_(0, tables.interval, found.mul_(per_element(tables.local, classes))).norm(dim=2)
    return far, near, states.norm(dim=2)
