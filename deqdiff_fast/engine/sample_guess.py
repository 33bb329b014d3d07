"""A guess of the sample, say a one-step student's, as the first guess of the whole chain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._types import unwrap_output, without_marks
from ..loop.base import Chain
from ..nodes.composite import LinearChain
from ..nodes.guess import SampleGuess, spread_gap
from ..schedule import Schedule
from ..schedule.cache import cached
from .initial_guess import linear_scan
from .node_problem import linear_chain
from .system import System

Init = Tensor | Callable[..., Any] | None


def resolve_init(
    init: Init, noise: Tensor, model_kwargs: dict[str, Any] | None, init_trajectory: Tensor | None
) -> Tensor | None:
    """The guess of the sample, (B, *shape).

    Args:
        init: the guess, or who makes it: init(noise, **model_kwargs), a tensor or an object with `.sample`.

    Raises:
        TypeError, ValueError: it is none.
    """
    if init is None:
        return None
    if init_trajectory is not None:
        raise ValueError("init, init_trajectory: expected one of them, got both")
    found: Any = init
    if not isinstance(init, Tensor):
        if not callable(init):
            raise TypeError(f"init: expected a tensor, a callable init(noise, **model_kwargs) or None, got {init!r}")
        with torch.no_grad():
            found = unwrap_output(init(noise, **without_marks(model_kwargs or {})))
    if not isinstance(found, Tensor) or found.shape != noise.shape:
        got = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"init: expected samples of the noise's shape {tuple(noise.shape)}, got {got}")
    if found.device != noise.device:
        raise ValueError(f"init: expected device {noise.device}, got {found.device}")
    if not bool(found.isfinite().all()):
        raise ValueError("init: expected finite values, got NaN or Inf; leave it out to start without one")
    return found.detach()


def sample_guess(system: System, chain: LinearChain, init: Tensor) -> SampleGuess:
    """As the rounds on nodes want it."""
    schedule, key = system.schedule, ("resolving", system.linear_model)
    sample = system.to_basis(init.reshape(system.batch, -1).to(system.dtype))
    return SampleGuess(sample, cached(schedule, key, lambda: resolving(schedule, chain)))


def resolving(schedule: Schedule, chain: LinearChain) -> Tensor:
    """(T, K) float64: how what the linear model lacks of a sample is shared out over time, see `SampleGuess`."""
    p = schedule.denoised_coef()[:, :1]
    known = ((p + chain.unit[:, None] * chain.slope) * schedule.signal[:-1, None]).clamp(0, 1)
    return known * (1 - known) / chain.unit[:, None]


def guess_towards(chain: Chain, system: System, init: Tensor) -> None:
    """Fill states 1..T with the chain that ends at `init`, (B, *shape)."""
    schedule, slope = system.schedule, system.linear_model or "scalar"
    linear, classes = cached(schedule, ("linear", slope), lambda: linear_chain(schedule, slope))
    guess = sample_guess(system, linear, init)
    lo, hi = torch.zeros_like(chain.lo), torch.full_like(chain.hi, chain.num_steps)
    chain.predictions.zero_()
    linear_scan(chain, system.diagonal_slope, lo, hi)
    influence = linear.influence.to(chain.states)
    where = None if classes is None else classes.to(chain.states.device)
    chain.predictions.copy_(spread_gap(guess, guess.shape.to(chain.states), influence, where, chain.states[-1]))
    linear_scan(chain, system.diagonal_slope, lo, hi)
