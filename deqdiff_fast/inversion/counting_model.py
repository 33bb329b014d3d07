"""A model that counts what is asked of it, backwards too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .._types import Model, unwrap_output
from ..model.knowledge import base_of


class CountingModel:
    """The model as a plain callable, so that the sampler finds no parameters to differentiate.

    Attributes:
        evals: rows (samples x timesteps) of all calls.
        calls: calls.
        backpropagations: rows of all vector-Jacobian products.
    """

    def __init__(self, model: Model) -> None:
        self.model, self.evals, self.calls, self.backpropagations = model, 0, 0, 0
        self.base_model = base_of(model)
        self.deqdiff_ranks = getattr(model, "deqdiff_ranks", None)
        self.takes_marks = getattr(model, "takes_marks", False)

    def __call__(self, x: Tensor, t: Tensor, **kwargs: Any) -> Any:
        self.calls, self.evals = self.calls + 1, self.evals + len(x)
        value = unwrap_output(self.model(x, t, **kwargs))
        if isinstance(value, Tensor) and value.requires_grad:
            hook: Callable[[Any], Any] = value.register_hook
            hook(self._count_backward)
        return value

    def _count_backward(self, grad: Tensor) -> None:
        self.backpropagations += len(grad)
