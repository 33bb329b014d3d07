"""The plain serial chain in torch: one model call a step, differentiable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._types import Generators, Model, unwrap_output, without_marks
from ..errors import NonFiniteError
from .noise import fill_drift
from .schedule import Schedule


def serial_chain(
    schedule: Schedule, noise: Tensor, predict: Callable[[Tensor, int], Tensor], drift: Tensor | None = None
) -> list[Tensor]:
    """The T + 1 states of the chain from `noise`: (B, D).

    Args:
        predict: (state (B, D), step i) -> prediction (B, D), input scaling and clipping included.
        drift: (T, B, D), the noise of every step times its coefficient; None for a deterministic chain.

    Raises:
        NonFiniteError: a state is NaN or Inf.
    """
    states, outs = [noise], []
    for i in range(schedule.num_steps):
        outs.append(predict(states[i], i))
        x = drift[i].to(noise.dtype) if drift is not None else torch.zeros_like(noise)
        for lag in range(min(schedule.lags, i + 1)):
            x = x + float(schedule.state_coef[i, lag]) * states[i - lag]
            x = x + float(schedule.model_coef[i, lag]) * outs[i - lag]
        finite = x.detach().isfinite().all(dim=1)
        if not bool(finite.all()):
            raise NonFiniteError.at_step(
                "NaN or Inf in the chain", step=i, num_steps=schedule.num_steps, timestep=float(schedule.timesteps[i]),
                round=i + 1, sample=int((~finite).int().argmax()),
            )  # fmt: skip
        states.append(x)
    return states


def draw_samples(
    model: Model, schedule: Schedule, noise: Tensor, model_kwargs: dict[str, Any] | None, generator: Generators
) -> Tensor:
    """Samples of a model by the serial chain, no gradient, all in one batch. noise: (B, *shape) -> (B, *shape)."""
    kwargs = dict(model_kwargs or {})
    if hasattr(model, "bind_batch"):  # a guided model brings per-sample tensors of its own
        kwargs = model.bind_batch(len(noise), kwargs)
    kwargs = without_marks(kwargs)
    coef, scale = schedule.denoised_coef().tolist(), schedule.input_scale.tolist()
    clip = None if schedule.clip is None else (schedule.clip.range, schedule.clip.gain.tolist())

    def predict(x: Tensor, i: int) -> Tensor:
        t = schedule.timesteps[i].to(noise.device).expand(len(x))
        t = t.to(noise.dtype) if t.is_floating_point() else t
        out: Tensor = unwrap_output(model((x * scale[i]).view(noise.shape), t, **kwargs)).flatten(1)
        out = out.to(noise.dtype, copy=True)  # the model may write its next output over this one
        if clip is None:
            return out
        denoised = coef[i][0] * x + coef[i][1] * out
        clipped: Tensor = out + clip[1][i] * (denoised.clamp(-clip[0], clip[0]) - denoised)
        return clipped

    with torch.no_grad():
        drift = None
        if schedule.stochastic:
            drift = noise.new_empty(schedule.num_steps, len(noise), noise[0].numel())
            fill_drift(drift, schedule, tuple(noise.shape), generator, noise.dtype)
        return serial_chain(schedule, noise.flatten(1), predict, drift)[-1].view(noise.shape)
