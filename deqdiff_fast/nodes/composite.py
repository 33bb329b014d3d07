"""Composite steps: a chain with linear predictions, made from node to node in one step each.

Between two nodes the remainder of the predictions is a local polynomial through the values at the nearest nodes, in
units of the clean sample (q times the remainder), where it is smooth up to the image end, as a function of
`grid.abscissae`. As predictions are slope[i] x_i + remainder[i], the state at the next node is linear in the state at
this one and in those few values. The coefficients depend on an element only by its slope, so they are kept for classes
of slopes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from .grid import adjoint

POINTS = 4  # of the interpolation: cubic


@dataclass(frozen=True, eq=False)
class LinearChain:
    """x_{i+1} = sum_l a[i,l] x_{i-l} + b[i,l] (c[i-l] x_{i-l} + remainder[i-l]); float64 on the CPU."""

    state_coef: Tensor  # (T, L) a
    model_coef: Tensor  # (T, L) b
    slope: Tensor  # (T, K) c of every class of elements
    unit: Tensor  # (T,) q, nowhere 0: remainders times it are smooth
    abscissa: Tensor  # (T,) increasing, of which they are a smooth function

    @cached_property
    def influence(self) -> Tensor:
        """(T, K): d sample / d remainder of each timestep."""
        return adjoint(self.state_coef, self.model_coef, self.slope)


class CompositeSteps(NamedTuple):
    """Steps between nodes; arguments of `kernels.node_scan`."""

    state_coef: Tensor  # (n, L, L, K)
    remainder_coef: Tensor  # (n, L, S, K)
    start: Tensor  # (n,) int32


def stencil(sources: Tensor, at: Tensor, points: int = POINTS) -> tuple[Tensor, Tensor]:
    """First of the `points` sources nearest to the interval that holds each timestep: (m,), and all of them, (m, S)."""
    count = min(points, len(sources))
    left = torch.searchsorted(sources, at, right=True) - 1
    start = (left - (count // 2 - 1)).clamp(0, len(sources) - count)
    return start, start[:, None] + torch.arange(count)


def lagrange(known: Tensor, at: Tensor) -> Tensor:
    """(..., m, S): what the polynomial through values at abscissae `known`: (m, S) float64, distinct in a row, takes of
    each at abscissae `at`: (..., m)."""
    other = ~torch.eye(known.shape[1], dtype=torch.bool)
    apart = torch.where(other, known[:, :, None] - known[:, None], 1).prod(-1)
    weights: Tensor = torch.where(other, (at[..., None] - known)[..., None, :], 1).prod(-1) / apart
    return weights


def interpolation(chain: LinearChain, sources: Tensor, at: Tensor, scaled: bool = True) -> Tensor:
    """(m, n) float64: what timesteps `at` take of the values at n sources; scaled: of remainders, in their unit."""
    _, near = stencil(sources, at)
    weights = lagrange(chain.abscissa[sources[near]], chain.abscissa[at])
    if scaled:
        weights = weights * chain.unit[sources[near]] / chain.unit[at, None]
    return torch.zeros(len(at), len(sources), dtype=torch.float64).scatter_(1, near, weights)


def composite_steps(chain: LinearChain, targets: Tensor, sources: Tensor) -> CompositeSteps:
    """Steps from each of the timesteps `targets` to the next, the last one to the sample, by the values at `sources`.

    All steps of one length are made at once, from the last of each backwards: what the state at the end takes of every
    step before it is known then, and it takes of the remainders as much.
    """
    a, b, c, unit, abscissa = chain.state_coef, chain.model_coef, chain.slope, chain.unit, chain.abscissa
    steps, lags = a.shape
    length = torch.cat([targets[1:], torch.tensor([steps])]) - targets
    start, near = stencil(sources, targets)
    known, number = sources[near], torch.arange(int(length.max()))[:, None]
    live, rows = number < length, (targets + number).clamp_max(steps - 1)  # (N, n), N the longest interval
    there = rows - torch.arange(lags)[:, None, None]
    b = torch.where((there >= 0) & live, b[rows].movedim(2, 0), 0)
    a, there = torch.where(there >= 0, a[rows].movedim(2, 0), 0), there.clamp_min(0)
    gain = (a[..., None] + b[..., None] * c[there]).movedim(0, 2)  # (N, n, L, K)
    share = lagrange(abscissa[known], abscissa[there]) * (unit[known] / unit[there][..., None])
    told = (b[..., None] * share).sum(0)  # (N, n, S)
    onward = torch.eye(lags, dtype=torch.float64)[:, :, None].expand(len(targets), -1, -1, c.shape[1])
    newest = list[Tensor]()  # of what the states at the end take of each step's
    for there_is, factor in zip(live.flip(0)[..., None, None, None], gain.flip(0)):
        newest.append(onward[:, :, 0])
        before = torch.cat([onward[:, :, 1:], torch.zeros_like(onward[:, :, :1])], 2)
        onward = torch.where(there_is, torch.addcmul(before, onward[:, :, :1], factor[:, None]), onward)
    remainder = torch.einsum("inlk,ins->nlsk", torch.stack(newest).flip(0), told)
    return CompositeSteps(onward, remainder, start.int())


def node_influence(steps: CompositeSteps) -> tuple[Tensor, Tensor]:
    """(n, K) each: d sample / d remainder at each source, where these are the targets too; and d sample / d state after
    each step, with the states before it that the chain knows, moved as much."""
    state, remainder, start = steps
    count, lags, points = remainder.shape[:3]
    found = torch.zeros(count, remainder.shape[3], dtype=torch.float64)
    carried = torch.zeros(lags, remainder.shape[3], dtype=torch.float64)
    carried[0] = 1
    after = torch.empty_like(found)
    for j in range(count - 1, -1, -1):
        after[j] = carried.sum(0)
        first = int(start[j])
        found[first : first + points] += (carried[:, None] * remainder[j]).sum(0)
        carried = (carried[:, None] * state[j]).sum(0)
    return found, after


def leave_one_out(chain: LinearChain, sources: Tensor) -> Tensor:
    """(n, n) float64: each remainder less what its four nearest neighbours say by interpolation."""
    count, abscissa, unit = len(sources), chain.abscissa, chain.unit
    found = torch.eye(count, dtype=torch.float64)
    if count < 3:
        return torch.zeros_like(found)
    around, number = min(POINTS, count - 1), torch.arange(count)
    near = (number - around // 2).clamp(0, count - around - 1)[:, None] + torch.arange(around + 1)
    near = near[near != number[:, None]].view(count, around)
    weights = lagrange(abscissa[sources[near]], abscissa[sources]) * unit[sources[near]] / unit[sources, None]
    return found.scatter_(1, near, -weights)
