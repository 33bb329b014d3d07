"""The noise of a restoration, drawn in the order of a serial sampler: the initial state, then step by step."""

from __future__ import annotations

import torch
from torch import Tensor

from .._types import FrozenNoise, Generators
from ..schedule import Schedule
from ..schedule.noise import check_generator, draw, freeze


def draw_noise(
    schedule: Schedule, shape: tuple[int, ...], generator: Generators, like: Tensor, noise: Tensor | None, every: bool,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The initial state (B, *shape), and normal noise (T, B, *shape) of every step, None where none is needed.

    noise: the initial state, if it is given, as with a `FrozenNoise`. every: steps of a deterministic schedule want
    noise too. temperature: the standard deviation of the steps' noise, and the factor of the initial state, given or
    drawn.
    """
    check_generator(generator, shape[0])
    dtype, device = like.dtype, like.device
    if noise is None:
        noise = draw(shape, generator, dtype, device) * schedule.init_noise_sigma
    noise = temperature * noise.to(dtype)
    if every and isinstance(generator, FrozenNoise):
        return noise, temperature * generator.draws.to(dtype)
    if every:
        steps = range(schedule.num_steps)
        return noise, temperature * torch.stack([draw(shape, generator, dtype, device) for _ in steps])
    frozen = freeze(schedule, shape, generator, dtype, device)
    if frozen is None:
        return noise, None
    assert schedule.draws is not None
    draws = torch.zeros((schedule.num_steps, *shape), dtype=dtype, device=device)
    draws[schedule.draws.to(device)] = temperature * frozen.draws.to(dtype)
    return noise, draws


def replayed(schedule: Schedule, draws: Tensor | None, every: bool) -> FrozenNoise | None:
    """What `draw_noise` is to be given as its generator to make the same draws again."""
    if draws is None:
        return None
    assert schedule.draws is not None
    return FrozenNoise(draws if every else draws[schedule.draws.to(draws.device)])
