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

    All steps of one length are made at once, so it takes as many operations as the longest interval has timesteps.
    """
    a, b, c, unit, abscissa = chain.state_coef, chain.model_coef, chain.slope, chain.unit, chain.abscissa
    steps, lags = a.shape
    length = torch.cat([targets[1:], torch.tensor([steps])]) - targets
    start, near = stencil(sources, targets)
    known = sources[near]
    points = near.shape[1]
    coef = torch.zeros(len(targets), lags, lags + points, c.shape[1], dtype=torch.float64)
    for lag in range(lags):
        coef[:, lag, lag] = 1  # of x_t, x_{t-1}, ... at the beginning
    rows = (targets + torch.arange(int(length.max()))[:, None]).clamp_max(steps - 1)
    before = [(rows - lag).clamp_min(0) for lag in range(lags)]
    shares = [lagrange(abscissa[known], abscissa[there]) * unit[known] / unit[there, None] for there in before]
    for done, row in enumerate(rows):
        new = torch.zeros_like(coef[:, 0])
        for lag in range(lags):
            there = row - lag
            exists, there = (there >= 0)[:, None], there.clamp_min(0)
            gain = torch.where(exists, a[row, lag, None] + b[row, lag, None] * c[there], 0)
            new += gain[:, None] * coef[:, lag]
            new[:, lags:] += torch.where(exists, b[row, lag, None] * shares[lag][done], 0)[..., None]
        made = torch.cat([new[:, None], coef[:, :-1]], 1)
        coef = torch.where((done < length)[:, None, None, None], made, coef)
    return CompositeSteps(coef[:, :, :lags], coef[:, :, lags:], start.int())


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
