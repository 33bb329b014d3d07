"""A part of a chain whose beginning is known."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..._types import FrozenNoise
from ...schedule import Schedule


def chain_part(
    schedule: Schedule, start: int, stop: int, states: Tensor, outputs: list[Tensor], noises: list[Tensor | None]
) -> tuple[Schedule, FrozenNoise | None]:
    """Steps start <= i < stop of a chain, and its noise. What earlier states and outputs add to the first of these
    steps is a number for each element, as noise is.

    Args:
        states: (at least start + 1, B, *shape).
        outputs: those of the steps before `start`, each (B, *shape).
        noises: of every step of the whole chain, None where it adds none.
    """
    state_coef, model_coef = schedule.state_coef[start:stop].clone(), schedule.model_coef[start:stop].clone()
    noise_coef = schedule.noise_coef[start:stop].clone()
    drawn: list[Tensor] = []
    draws = torch.zeros(stop - start, dtype=torch.bool, device="cpu")
    for i in range(start, stop):
        k, noise = i - start, noises[i]
        known: Tensor | None = None
        for lag in range(i - start + 1, min(schedule.lags, i + 1)):
            a, b = float(state_coef[k, lag]), float(model_coef[k, lag])
            if a or b:
                known = (0.0 if known is None else known) + a * states[i - lag] + b * outputs[i - lag]
            state_coef[k, lag] = model_coef[k, lag] = 0.0
        if known is not None:
            noise = known if noise is None else known + float(noise_coef[k]) * noise
            noise_coef[k] = 1.0
        if noise is not None:
            drawn.append(noise.to(states.dtype))
            draws[k] = True
    clip = schedule.clip and replace(schedule.clip, gain=schedule.clip.gain[start:stop])
    part = Schedule(
        schedule.timesteps[start:stop], schedule.input_scale[start:stop], state_coef, model_coef, noise_coef,
        schedule.signal[start : stop + 1], schedule.sigma[start : stop + 1], schedule.prediction_type, clip,
        schedule.name, schedule.init_noise_sigma,
        None if schedule.x0_coef is None else schedule.x0_coef[start:stop], draws,
    )  # fmt: skip
    return part, FrozenNoise(torch.stack(drawn)) if drawn else None
