"""Random chains with linear predictions, and the plain chain that their composite steps stand for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from deqdiff_fast.kernels import node_scan
from deqdiff_fast.nodes.composite import CompositeSteps, LinearChain


def random_chain(steps: int = 23, lags: int = 1, kinds: int = 3, seed: int = 0) -> LinearChain:
    """Coefficients of order one, that carry states on without blowing them up; a unit that is not constant, and
    abscissae that are not evenly apart."""
    draw = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(steps, lags, generator=draw, dtype=torch.float64) for _ in range(2))
    exists = torch.arange(steps)[:, None] >= torch.arange(lags)
    c = 0.3 * torch.randn(steps, kinds, generator=draw, dtype=torch.float64)
    unit = -torch.linspace(3, 0.2, steps, dtype=torch.float64)
    abscissa = (0.5 + torch.rand(steps, generator=draw, dtype=torch.float64)).cumsum(0)
    return LinearChain((0.9 + 0.1 * a) / lags * exists, 0.3 * b * exists, c, unit, abscissa)


def polynomial(chain: LinearChain, known: Tensor, values: Tensor, at: int) -> Tensor:
    """The value at `at` of the polynomial through unit * values at the timesteps `known`, in the plain unit again."""
    abscissa, unit = chain.abscissa - chain.abscissa[known[0]], chain.unit
    powers = torch.arange(len(known), dtype=torch.float64)
    coef = torch.linalg.solve(abscissa[known, None] ** powers, (unit[known, None] * values.flatten(1)))
    return ((abscissa[at] ** powers) @ coef / unit[at]).view(values.shape[1:])


def nearest_four(sources: list[int], at: int) -> Tensor:
    """The four sources around the interval that holds `at`, fewer where there are fewer."""
    count, left = min(4, len(sources)), sum(s <= at for s in sources) - 1
    first = min(max(left - (count // 2 - 1), 0), len(sources) - count)
    return torch.arange(first, first + count)


def step_by_step(
    chain: LinearChain, targets: list[int], sources: list[int], remainder: Tensor, start: Tensor,
    classes: Tensor, drift: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """(T + 1, B, D): one step after the other, the remainder of every interval from the polynomial around it."""
    a, b, c = chain.state_coef, chain.model_coef, chain.slope
    states, at = [start], torch.tensor(sources)
    for i in range(len(a)):
        near = nearest_four(sources, max(t for t in targets if t <= i))
        x = torch.zeros_like(start) if drift is None else drift[i].clone()
        for lag in range(min(a.shape[1], i + 1)):
            there = i - lag
            rest = polynomial(chain, at[near], remainder[near], there)
            x += a[i, lag] * states[there] + b[i, lag] * (c[there, classes] * states[there] + rest)
        states.append(x)
    return torch.stack(states)


def scan(
    steps: CompositeSteps, remainder: Tensor, start: Tensor, classes: Tensor, drift: Tensor | None = None
) -> Tensor:
    """(n + 1, B, D): the states that composite steps make."""
    states = start.new_zeros(len(steps.start) + 1, *start.shape)
    states[0] = start
    node_scan(states, remainder, *steps, classes=classes.int(), drift=drift, backend="reference")
    return states


@pytest.fixture(name="random_chain")
def _random_chain() -> Callable[..., LinearChain]:
    return random_chain


@pytest.fixture(name="polynomial")
def _polynomial() -> Callable[..., Tensor]:
    return polynomial


@pytest.fixture(name="step_by_step")
def _step_by_step() -> Callable[..., Tensor]:
    return step_by_step


@pytest.fixture(name="scan")
def _scan() -> Callable[..., Tensor]:
    return scan


@pytest.fixture
def gaussian() -> Callable[..., Tensor]:
    def make(*shape: int, seed: int = 1) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    return make
