"""The model of a restoring chain, on rows."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from .._types import Model, parameters_of, unwrap_output
from ..errors import ModelOutputError
from ..model.knowledge import base_of, variant_of
from ..model.outputs import output_fault
from ..operators import Operator
from ..schedule import Schedule
from .base import Coordinates, Method, Rows
from .levels import Levels, column

KEY = "restoration"  # in model_kwargs


class RestoringModel:
    """`model` with the clean sample that it predicts replaced by that of a method, in the unknowns of `coordinates`.

    x0 = p x + q o is clipped where the schedule clips, replaced, and made a prediction again: o = (w - p u) / q. So it
    is one more pointwise map of the predicted clean sample, as clipping is, and everything else of a chain is as ever.
    """

    deqdiff_told_steps = True

    def __init__(
        self, model: Model, method: Method, coordinates: Coordinates, operator: Operator, schedule: Schedule,
        levels: Levels, variant: Any,
    ) -> None:  # fmt: skip
        """schedule: as it was given, with its clipping. variant: what tells this from other uses of the model."""
        self.model, self.method, self.coordinates, self.operator = model, method, coordinates, operator
        self.schedule, self.levels = schedule, levels
        self.base_model = base_of(model)
        self.deqdiff_variant = ("restoration", variant, variant_of(model))
        self._tables: dict[Any, tuple[Levels, Tensor]] = {}
        if hasattr(model, "bind_batch"):
            self.bind_batch = self._bind

    @property
    def deqdiff_rough_in_time(self) -> bool:
        """Whether what is known holds another noise at every timestep."""
        return self.coordinates.fresh

    @property
    def deqdiff_amplifies(self) -> bool:
        """Whether steps go along the model's Jacobian, which changes most where it decides something."""
        return self.method.needs_vjp

    def parameters(self) -> list[Tensor]:
        """Those of the model, where it is a module."""
        return parameters_of(self.model)

    def conditioning_tensors(self) -> list[Tensor]:
        """Those of a guided model."""
        found: Callable[[], Any] = getattr(self.model, "conditioning_tensors", list)
        return list(found())

    def _bind(self, batch: int, kwargs: dict[str, Any]) -> dict[str, Any]:
        rest = {name: value for name, value in kwargs.items() if name != KEY}
        bind: Callable[[int, dict[str, Any]], dict[str, Any]] = getattr(self.model, "bind_batch")  # noqa: B009
        return {**bind(batch, rest), KEY: kwargs[KEY]}

    def __call__(
        self, inputs: Tensor, t: Tensor, /, *, step: Tensor, restoration: dict[str, Any], **kwargs: Any
    ) -> Tensor:
        """The prediction (n, *shape) for rows of unknowns, in float32 or float64. inputs: scaled as the model wants."""
        dtype = torch.float64 if inputs.dtype == torch.float64 else torch.float32
        levels, scale = self._on(inputs.device, dtype)
        sample, data = restoration["sample"], restoration["data"]
        operator, differentiated = self.operator.for_samples(sample), torch.is_grad_enabled()
        rows = Rows(step, sample, operator, data, levels, differentiated=differentiated)
        u = inputs.to(dtype) / column(scale[step], inputs)
        x, unknown = self.coordinates.state(u, rows)
        guided = self.method.needs_vjp
        with torch.inference_mode(False) if guided else nullcontext(), torch.enable_grad() if guided else nullcontext():
            if guided:
                x = x if differentiated and x.requires_grad else x.detach().clone().requires_grad_()
            scaled = (x * column(scale[step], x)).to(inputs.dtype)
            output = unwrap_output(self.model(scaled, t, **kwargs))
            fault = output_fault(output, tuple(x.shape), x.device)
            if fault:
                raise ModelOutputError(f"the model returned {fault}")
            output = output.to(dtype)
            x0 = self._clipped(rows.level("p", x) * x + rows.level("q", x) * output)
            if guided:
                rows.vjp = lambda v: torch.autograd.grad(x0, x, v, create_graph=differentiated)[0]
            restored = self.method.restored(x0, x, rows)
        w = self.coordinates.clean(restored if differentiated else restored.detach(), unknown, rows)
        # what of u counts for nothing is 0 along the chain; as the solver's slope leaves it, it stays small on the way
        slope = column(restoration["slope"].to(u)[step], u)
        return (w - rows.level("p", u) * unknown) / rows.level("q", u) + slope * (u - unknown)

    def _clipped(self, x0: Tensor) -> Tensor:
        clip = self.schedule.clip
        return x0 if clip is None else x0.clamp(-clip.range, clip.range)

    def _on(self, device: torch.device, dtype: torch.dtype) -> tuple[Levels, Tensor]:
        key = (device, dtype)
        if key not in self._tables:
            with torch.inference_mode(False):
                self._tables[key] = (self.levels.to(device, dtype), self.schedule.input_scale.to(device, dtype))
        return self._tables[key]
