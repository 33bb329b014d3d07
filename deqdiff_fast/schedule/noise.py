"""The frozen noise of stochastic samplers, drawn in the order in which a serial sampler draws it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .._types import FrozenNoise, Generators
from .schedule import Schedule


def check_generator(generator: Generators, batch: int) -> None:
    """Raise unless `generator` is None, one torch.Generator, a list with one for each sample, or frozen noise."""
    if isinstance(generator, (list, tuple)):
        if len(generator) != batch or not all(isinstance(g, torch.Generator) for g in generator):
            raise ValueError(
                f"generator: expected {batch} torch.Generator, one for each sample, got {len(generator)} items"
            )
    elif generator is not None and not isinstance(generator, (torch.Generator, FrozenNoise)):
        raise TypeError(f"generator: expected a torch.Generator or a list of them, got {type(generator).__name__}")


def draw(shape: tuple[int, ...], generator: Generators, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Standard normal noise (B, *shape); with a list, sample b comes from generator b alone, as in diffusers."""
    if isinstance(generator, (list, tuple)):
        return torch.cat([draw((1, *shape[1:]), g, dtype, device) for g in generator])
    assert not isinstance(generator, FrozenNoise)
    source = generator.device if generator is not None else device
    return torch.randn(shape, generator=generator, dtype=dtype, device=source).to(device)


def fill_drift(
    drift: Tensor, schedule: Schedule, shape: tuple[int, ...], generator: Generators, dtype: torch.dtype,
    device: torch.device | None = None, part: Callable[[Tensor], Tensor] | None = None,
) -> None:  # fmt: skip
    """drift[i] = noise_coef[i] * z_i in place, drift: (T, B, D). Draws exactly where the schedule says so.

    device: where z_i, (B, D), is drawn, None for that of the drift. part: what is kept of it.
    """
    device = drift.device if device is None else device
    assert schedule.draws is not None  # filled in by the schedule itself
    frozen = iter(generator.draws) if isinstance(generator, FrozenNoise) else None
    for i, (scale, drawn) in enumerate(zip(schedule.noise_coef.tolist(), schedule.draws.tolist())):
        if drawn:
            z = (draw(shape, generator, dtype, device) if frozen is None else next(frozen)).flatten(1)
            drift[i].copy_(z if part is None else part(z)).mul_(scale)
        else:
            drift[i].zero_()


def discard_draws(
    schedule: Schedule, shape: tuple[int, ...], generator: Generators, dtype: torch.dtype, device: torch.device
) -> None:
    """Leave a caller's generator as a scheduler would whose draws all count for nothing: no step of it adds noise."""
    assert schedule.draws is not None
    if generator is not None and not isinstance(generator, FrozenNoise):
        for _ in range(int(schedule.draws.sum())):
            draw(shape, generator, dtype, device)


def freeze(
    schedule: Schedule, shape: tuple[int, ...], generator: Generators, dtype: torch.dtype, device: torch.device
) -> FrozenNoise | None:
    """All draws of one chain for samples (B, *shape); None for a deterministic one."""
    assert schedule.draws is not None
    if not schedule.stochastic:
        discard_draws(schedule, shape, generator, dtype, device)
        return None
    if isinstance(generator, FrozenNoise):
        return generator
    return FrozenNoise(torch.stack([draw(shape, generator, dtype, device) for _ in range(int(schedule.draws.sum()))]))
