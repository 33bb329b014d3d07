"""The model whose draft is made, asked on rows: any states, any timesteps of its schedule, any of the conditions."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .._types import Model, Shared, parameters_of
from ..engine.row_limit import row_limit
from ..errors import NonFiniteError
from ..model.batched import BatchedModel
from ..model.draft_conditions import Pooled, pool
from ..model.sample_kwargs import is_list_of_strings, select_samples
from ..schedule import Schedule

CONDITIONS = 256  # asked of a function that draws them

Drawn = dict[str, Any] | Callable[[int], dict[str, Any]] | None


def inputs_like(model: Model, device: torch.device | str | None) -> Tensor:
    """An empty tensor of the dtype and on the device of the model's inputs: `device`, or that of its first
    parameter."""
    first = next(iter(parameters_of(model)), torch.empty(0))
    dtype = first.dtype if first.is_floating_point() else torch.float32
    return torch.empty(0, dtype=dtype, device=first.device if device is None else torch.device(device))


def count_conditions(model: Model, kwargs: dict[str, Any]) -> int:
    """How many rows the keyword arguments, and the conditioning of a guided model, have; 1 without any.

    Raises:
        ValueError: they disagree.
    """
    own = list(getattr(model, "conditioning_tensors", list)())
    whole = lambda value: isinstance(value, Shared) or is_list_of_strings(value)  # noqa: E731
    leaves = [leaf for leaf in tree_leaves(kwargs, whole) if not isinstance(leaf, Shared)]
    counts = {len(leaf) for leaf in leaves if is_list_of_strings(leaf) or (isinstance(leaf, Tensor) and leaf.dim())}
    counts |= {len(leaf) for leaf in own if leaf.dim()} - {1}
    if len(counts) > 1:
        raise ValueError(
            f"model_kwargs: expected as many rows in every tensor, one for each condition, got {sorted(counts)}; mark "
            "what belongs to no sample with deqdiff_fast.shared(...)"
        )
    return counts.pop() if counts else 1


class Teacher:
    """A model on rows, without clipping, for that is no part of what a draft learns.

    Args:
        model, schedule, shape, model_kwargs: see `distill`.
        like: of what dtype and device the model's inputs are.

    Raises:
        TypeError, ValueError: bad conditions.
    """

    def __init__(
        self, model: Model, schedule: Schedule, shape: tuple[int, ...], model_kwargs: Drawn, like: Tensor
    ) -> None:
        kwargs = model_kwargs(CONDITIONS) if callable(model_kwargs) else dict(model_kwargs or {})
        if not isinstance(kwargs, dict):
            raise TypeError(f"model_kwargs: expected a function that returns a dict, got {type(kwargs).__name__}")
        self.model, self.schedule, self.shape = model, schedule, shape
        self.conditions = count_conditions(model, kwargs)
        noise = like.new_empty(self.conditions, *shape)
        limit = row_limit(None, noise)
        self.rows = BatchedModel(model, replace(schedule, clip=None), noise, kwargs, limit)
        self.clipping = BatchedModel(model, schedule, noise, kwargs, limit)
        self.pooled: Pooled = pool(self.rows.model_kwargs, self.conditions, shape[1:])
        self.device, self.dtype = like.device, like.dtype

    def __call__(self, states: Tensor, step: Tensor, condition: Tensor) -> Tensor:
        """(n, D) states of timesteps step: (n,), under conditions (n,) -> (n, D) predictions. Raises
        ModelOutputError."""
        found = []
        for start, stop in self.rows.chunks(len(states)):
            at = slice(start, stop)
            kwargs = self.rows.expand_kwargs(condition[at])
            found.append(self.rows.predict(states[at], step[at], kwargs))
        return torch.cat(found)

    def checked(self, states: Tensor, step: Tensor, condition: Tensor) -> Tensor:
        """The same. Raises NonFiniteError too."""
        predictions = self(states, step, condition)
        finite = predictions.isfinite().all(1)
        if not bool(finite.all()):
            bad = int((~finite).int().argmax())
            raise NonFiniteError.at_step(
                "the model returned NaN or Inf", step=int(step[bad]), num_steps=self.schedule.num_steps,
                timestep=float(self.schedule.timesteps[step[bad].cpu()]), round=0, sample=bad,
            )  # fmt: skip
        return predictions

    def clip(self, predictions: Tensor, states: Tensor, step: Tensor) -> Tensor:
        """As the schedule clips them."""
        return self.clipping.clip(predictions, states, step)

    def inputs(self, states: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """(n, D) states -> what a model is given for them: (n, *shape) and its times (n,) float64."""
        scale = self.rows.input_scale
        scaled = states if scale is None else states * scale[step, None]
        return scaled.view(-1, *self.shape), self.schedule.timesteps.to(self.device)[step]

    def time_row(self, rows: int, generator: torch.Generator) -> float:
        """Seconds of a row of a call on at most that many; the second one, the first prepares."""
        rows = min(self.rows.max_batch or rows, rows)
        states = torch.randn(rows, math.prod(self.shape), generator=generator) * self.schedule.init_noise_sigma
        states = states.to(self.device, self.rows.dtype)
        step = torch.linspace(0, self.schedule.num_steps - 1, rows).long().to(self.device)
        condition = torch.arange(rows, device=self.device) % self.conditions
        for _ in range(2):
            started = time.perf_counter()
            float(self(states, step, condition).float().sum())
            taken = time.perf_counter() - started
        return taken / rows

    def call(self, x: Tensor, t: Tensor, **kwargs: Any) -> Any:
        """The model itself, for a sampler that is given `kwargs_of`: its own conditioning is among them."""
        return self.model(x, t, **kwargs)

    def kwargs_of(self, condition: Tensor) -> dict[str, Any]:
        """The keyword arguments for a batch of samples of these conditions, (B,)."""
        kwargs: dict[str, Any] = select_samples(self.rows.model_kwargs, self.conditions, condition)
        return kwargs
