"""A guess of the sample, made into a guess of the chain."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .node_grid import per_element

LEAST_RESPONSE = 1e-6  # of the sample to remainders of size 1: below that the linear model alone decides


class SampleGuess(NamedTuple):
    """What the sample may be, and how a chain gets there.

    The chain of the linear model ends somewhere else. What it lacks is shared out over the timesteps as a remainder in
    units of the clean sample: in proportion to g (1 - g), with g the part of a clean coefficient that is known at a
    noise level if data is Gaussian, s^2 S / (s^2 S + sigma^2). A model's denoised estimate differs from the linear one
    where some but not all of a sample has been decided: at high noise it does not know of which kind the sample is (g),
    at low noise the state says it all (1 - g).
    """

    sample: Tensor  # (B, D)
    shape: Tensor  # (T, K) remainders of that proportion


def spread_gap(guess: SampleGuess, shape: Tensor, influence: Tensor, classes: Tensor | None, last: Tensor) -> Tensor:
    """(n, B, D) remainders with which a chain that ends at `last`, (B, D), without any ends at the guess.

    Args:
        shape: (n, K) that of the guess, at n timesteps.
        influence: (n, K) d sample / d remainder there.
        classes: of the elements, or None for a single one.
    """
    response = (influence * shape).sum(0, keepdim=True)
    usable = response.abs() > LEAST_RESPONSE
    weights = (shape / response.masked_fill(~usable, 1.0)).masked_fill(~usable, 0.0)
    spread: Tensor = per_element(weights, classes) * (guess.sample - last)
    return spread
