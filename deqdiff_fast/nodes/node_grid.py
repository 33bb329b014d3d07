"""One set of nodes with everything that follows from it, on the device of a solve."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .composite import (
    CompositeSteps,
    LinearChain,
    composite_steps,
    interpolation,
    leave_one_out,
    node_influence,
)

SIGNS = 4


@dataclass(frozen=True)
class NodeGrid:
    """n nodes of a chain; K classes of elements."""

    nodes: tuple[int, ...]
    whole: bool  # whether they are all timesteps
    at: Tensor  # (n,) int64
    steps: CompositeSteps
    slope: Tensor  # (n, K) of the prediction in the state
    influence: Tensor  # (n, K) d sample / d remainder
    after: Tensor  # (n, K) d sample / d state of the next node
    local: Tensor  # (n, K) d state of the next node / d remainder
    excess: Tensor  # (n, K) that part of the influence that stands for timesteps that are not asked
    unasked: Tensor  # (n,) that part of `local` that does
    leave_one_out: Tensor  # (n, n)
    signs: Tensor  # (n, SIGNS), random ones, for sums of what is independent from node to node; all plus in the first

    @classmethod
    def of(cls, chain: LinearChain, nodes: list[int], dtype: torch.dtype, device: torch.device) -> NodeGrid:
        at = torch.tensor(nodes)
        steps = composite_steps(chain, at, at)
        influence, after = node_influence(steps)
        own = chain.influence[at]
        number = torch.arange(len(nodes))
        local = steps.remainder_coef[number, 0, number - steps.start]
        length = torch.cat([at[1:], torch.tensor([len(chain.unit)])]) - at
        unasked = (length - 1) / length
        signs = torch.randint(0, 2, (len(nodes), SIGNS), generator=torch.Generator().manual_seed(0)) * 2 - 1
        signs[:, 0] = 1
        tables = [chain.slope[at], influence, after, local, influence - own, unasked, leave_one_out(chain, at), signs]
        whole, there = len(nodes) == len(chain.unit), (t.to(device, dtype) for t in tables)
        return cls(tuple(nodes), whole, at.to(device), on(steps, dtype, device), *there)


@dataclass(frozen=True)
class Transfer:
    """From one set of nodes, the sources, to another one or to single timesteps."""

    steps: CompositeSteps
    plain: Tensor  # (m, n) interpolation of what is smooth as it is
    scaled: Tensor  # (m, n) of remainders
    kept: Tensor  # (m,) bool: which targets are sources

    @classmethod
    def of(
        cls, chain: LinearChain, sources: tuple[int, ...], targets: tuple[int, ...], dtype: torch.dtype,
        device: torch.device,
    ) -> Transfer:  # fmt: skip
        known, at = torch.tensor(sources), torch.tensor(targets)
        plain = interpolation(chain, known, at, scaled=False)
        scaled = plain * chain.unit[known] / chain.unit[at, None]
        return cls(
            on(composite_steps(chain, at, known), dtype, device), plain.to(device, dtype), scaled.to(device, dtype),
            torch.isin(at, known).to(device),
        )  # fmt: skip


def on(steps: CompositeSteps, dtype: torch.dtype, device: torch.device) -> CompositeSteps:
    """The same coefficients where a kernel wants them."""
    state, remainder, start = steps
    return CompositeSteps(
        state.to(device, dtype).contiguous(), remainder.to(device, dtype).contiguous(), start.to(device)
    )


def per_element(table: Tensor, classes: Tensor | None) -> Tensor:
    """(n, K) -> (n, 1, D), or (n, 1, 1) where all elements are of one class."""
    return table[:, None] if classes is None else table.index_select(1, classes)[:, None]
