"""A model that counts what is asked of it, backwards too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .._types import Model, unwrap_output


class Counted:
    """The model as a plain callable: its parameters get no gradient. Counts are in rows (samples x timesteps)."""

    def __init__(self, model: Model) -> None:
        self.model, self.evals, self.calls, self.backpropagations = model, 0, 0, 0
        self.base_model = getattr(model, "base_model", model)

    def __call__(self, x: Tensor, t: Tensor, **kwargs: Any) -> Any:
        self.calls, self.evals = self.calls + 1, self.evals + len(x)
        output = self.model(x, t, **kwargs)
        value = unwrap_output(output)
        if isinstance(value, Tensor) and value.requires_grad:
            hook: Callable[[Any], Any] = value.register_hook
            hook(self._note)
        return value

    def _note(self, grad: Tensor) -> None:
        self.backpropagations += len(grad)
