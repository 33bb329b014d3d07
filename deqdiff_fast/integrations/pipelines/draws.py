"""The noise that a scheduler's own code draws: in its dtype, from its device, in its order."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ...schedule.probe import next_state

_NORMAL = (torch.randn, torch.randn_like)


class _Draws(TorchFunctionMode):
    """Keeps what is drawn within it."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[Tensor] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _NORMAL:
            self.drawn.append(result)
        return result


@torch.no_grad()
def record_draws(
    scheduler: Any, timesteps: Tensor, sample: Tensor, output: Tensor, step_kwargs: dict[str, Any], scaled: bool
) -> list[Tensor]:
    """The noises, each of the shape of `sample`, that the scheduler draws from the loop's own generators.

    Args:
        scheduler: as it is before the first step; a copy is stepped.
        timesteps: (T,), those of the loop.
        sample, output: as the loop passes them to its first step; their values do not matter.
        step_kwargs: what the loop passes besides.
        scaled: whether the loop scales its model's input.

    Raises:
        ValueError: it draws noise of another shape.
    """
    own, found = copy.deepcopy(scheduler), []
    state, output = sample.clone(), torch.zeros_like(output)
    for t in timesteps:
        if scaled:
            own.scale_model_input(state, t)
        with _Draws() as mode:
            state = next_state(own.step(output, t, state, **step_kwargs))
        if mode.drawn:
            noise = torch.cat([z.to(sample.device) for z in mode.drawn])  # with a list of generators one a sample
            if noise.shape != sample.shape:
                raise ValueError(
                    f"scheduler: expected noise of shape {tuple(sample.shape)} in a step, {type(scheduler).__name__} "
                    f"draws {tuple(noise.shape)}"
                )
            found.append(noise)
    return found
