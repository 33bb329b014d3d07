"""What a loop does in a step: where the state went that it gave to scheduler and networks."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .calls import Call
from .placement import locate


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
    """What the calls of the networks and the sample that is stepped are made of; None where they are made otherwise.

    Writes into `calls` where the state lies in their inputs, and the real inputs.

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
    if not (is_tiled(raw, start) and is_tiled(real, real[:rows])):
        return None
    for call in calls:
        if call.fed:
            assert call.placement is not None
            call.placement = replace(call.placement, copies=len(call.x) // rows)
        elif not place(call, start):
            return None
    fed = [call.fed for call in calls]
    return FirstStep(calls, start, real, any(fed), step_scaled) if any(fed) == all(fed) else None


def bring_back(call: Call, marker: Tensor, after: Tensor) -> None:
    """Put what the scheduler has scaled into an input that was given random numbers for it."""
    call.placement = locate(call.x, marker)
    if call.placement is not None and call.placement.mask is None:  # what else there is might be random, too
        call.x = call.placement.fill(after, torch.arange(len(call.x), device=call.x.device))
        call.fed = True


def place(call: Call, state: Tensor) -> bool:
    """Find `state` in an input; False: it is not there."""
    call.placement = locate(call.x, state)
    return call.placement is not None


def is_tiled(whole: Tensor, part: Tensor) -> bool:
    """Whether `whole` is `part`, or a few copies of it, one after the other."""
    if part.shape[1:] != whole.shape[1:] or not len(part) or len(whole) % len(part):
        return False
    return bool((whole.reshape(-1, *part.shape) == part).all())


def is_state(sample: Tensor, state: Tensor, *others: torch.dtype) -> bool:
    """Whether `sample` is `state`, or a few copies of it, up to what the coarsest of their dtypes and `others` rounds:
    loops cast what they are given."""
    kind = min(sample.dtype, state.dtype, *others, key=lambda dtype: dtype.itemsize)
    return is_tiled(sample.to(kind), state.to(kind))
