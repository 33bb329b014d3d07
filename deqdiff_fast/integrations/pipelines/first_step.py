"""What a loop does in its first step: where the state went that it gave to scheduler and model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .calls import Call


@dataclass
class FirstStep:
    """As recorded, with real values in the place of random ones."""

    calls: list[Call]
    start: Tensor  # (B, *shape), before any scaling
    sample: Tensor  # what the scheduler steps, with as many rows
    input_scaled: bool  # whether the model is given what `scale_model_input` returned
    step_scaled: bool  # whether the scheduler steps it
    timestep: Any = None  # as passed to the scheduler's `step`
    output: Tensor = field(default_factory=lambda: torch.empty(0, device="cpu"))  # of which shape and dtype count
    step_kwargs: dict[str, Any] = field(default_factory=dict)  # what is passed besides, except `return_dict`
    count: int | None = None  # number of steps of the loop, None for all that are left


def read_first_step(
    calls: list[Call], scaled: tuple[Tensor, Tensor] | None, marker: Tensor | None, sample: Tensor, halves: int
) -> FirstStep | None:
    """What the calls of the model and the sample that is stepped are made of; None where they are made otherwise.

    Writes the real inputs into `calls`.

    Args:
        scaled: what the loop gave to `scale_model_input`, and what that returns.
        marker: the random numbers that it was given instead.
        sample: what it gave to `step`.
        halves: how often the state occurs in that.
    """
    raw, after = scaled if scaled is not None else (sample, sample)
    step_scaled = marker is not None and is_tiled(marker, sample)
    rows = len(sample) // halves
    start = raw[:rows] if step_scaled else sample[:rows]
    real = after[: len(sample)] if step_scaled else sample
    fed = [marker is not None and is_tiled(call.x, marker) for call in calls]
    known = all(seen or is_tiled(call.x, start) for seen, call in zip(fed, calls))
    if not (is_tiled(raw, start) and is_tiled(real, real[:rows]) and known and any(fed) == all(fed)):
        return None
    for call, seen in zip(calls, fed):
        source = after if seen else start
        call.x = torch.cat([source] * (len(call.x) // len(source)))
    return FirstStep(calls, start, real, any(fed), step_scaled)


def is_tiled(whole: Tensor, part: Tensor) -> bool:
    """Whether `whole` is `part`, or a few copies of it, one after the other."""
    if part.shape[1:] != whole.shape[1:] or not len(part) or len(whole) % len(part):
        return False
    return bool((whole.reshape(-1, *part.shape) == part).all())
