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
        self._sample = torch.arange(model.batch, device=model.device)

    def rows(self, states: Tensor, steps: Tensor) -> Tensor:
        """(n, B, D) states at timesteps steps: (n,) -> (n, B, D) predictions."""
        step, sample, flat = steps, self._sample, states.flatten(0, 1)
        if self.model.batch > 1:
            step = steps[:, None].expand(-1, self.model.batch).flatten()
        if self.model.model_kwargs:
            sample = self._sample.repeat(len(steps))
        chunks = [self._predict(flat[a:b], step[a:b], sample[a:b]) for a, b in self.model.chunks(len(flat))]
        return (chunks[0] if len(chunks) == 1 else torch.cat(chunks)).view_as(states)

    def _predict(self, states: Tensor, step: Tensor, sample: Tensor) -> Tensor:
        self.evals += len(states)
        try:
            return self.model.predict(states, step, self.model.expand_kwargs(sample))
        except ModelOutputError as error:
            raise ModelOutputError(str(error).replace("the model", "the draft", 1)) from None
