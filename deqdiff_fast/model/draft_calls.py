"""Calls of a draft, in the coordinates of the solver."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ModelOutputError
from .batched import BatchedModel


class DraftCalls:
    """A draft called on rows of a chain, as the model is: input scale, clipping, conditions.

    Args:
        model: the draft in the place of the model, in the model's own basis.

    Attributes:
        evals: rows that it was called on so far.
    """

    def __init__(self, model: BatchedModel) -> None:
        self.model, self.evals = model, 0

    def rows(self, states: Tensor, steps: Tensor, samples: Tensor) -> Tensor:
        """(r, D) states at timesteps steps, (r,), of samples, (r,) -> (r, D) predictions."""
        found = [self._predict(states[a:b], steps[a:b], samples[a:b]) for a, b in self.model.chunks(len(states))]
        return found[0] if len(found) == 1 else torch.cat(found)

    def _predict(self, states: Tensor, step: Tensor, sample: Tensor) -> Tensor:
        self.evals += len(states)
        try:
            return self.model.predict(states, step, self.model.expand_kwargs(sample))
        except ModelOutputError as error:
            raise ModelOutputError(str(error).replace("the model", "the draft", 1)) from None
