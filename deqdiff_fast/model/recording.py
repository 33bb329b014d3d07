"""What a model predicts while solves are made, kept for `distill`: a draft then costs no model calls of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._locks import Lock
from .._types import Model, unwrap_output, without_marks
from .draft_conditions import Pooled, pool
from .knowledge import base_of

MOST_BYTES = 2**29


class Recording:
    """Inputs, times, conditions and predictions of model calls, row by row, on the host.

    Give one to `DEQSampler.record`, solve, then give it to `distill`. Safe to share between samplers of the same model,
    and between threads. Conditions are kept as a draft sees them: sequences of embeddings as their mean.

    Args:
        max_bytes: beyond them nothing more is kept.
    """

    def __init__(self, max_bytes: int = MOST_BYTES) -> None:
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 1:
            raise ValueError(f"max_bytes: expected an int >= 1, got {max_bytes!r}")
        self.max_bytes, self.bytes, self.rows = max_bytes, 0, 0
        self._lock, self._calls = Lock(), list[tuple[Tensor, Tensor, Tensor, Pooled]]()

    def __len__(self) -> int:
        """How many rows it holds."""
        return self.rows

    def add(self, x: Tensor, t: Tensor, prediction: Tensor, kwargs: dict[str, Any]) -> None:
        """Keep one call. x, prediction: (n, *shape); t: (n,); kwargs: the model's."""
        x, t, prediction = (value.detach().to("cpu", copy=True) for value in (x, t, prediction))
        pooled = {name: value.cpu() for name, value in pool(kwargs, len(x), tuple(x.shape[2:])).items()}
        size = sum(value.nbytes for value in (x, t, prediction, *pooled.values()))
        with self._lock:
            if self._calls and self._calls[0][0].shape[1:] != x.shape[1:]:
                raise ValueError(
                    f"recording: expected samples of shape {tuple(self._calls[0][0].shape[1:])} like those that it "
                    f"holds, got {tuple(x.shape[1:])}"
                )
            if self.bytes + size <= self.max_bytes:
                self._calls.append((x, t.double(), prediction, pooled))
                self.bytes, self.rows = self.bytes + size, self.rows + len(x)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Pooled]:
        """(inputs (n, *shape), times (n,) float64, predictions (n, *shape), conditions that all calls had) of all
        rows, in float32. Raises ValueError where there are none."""
        with self._lock:
            calls = list(self._calls)
        if not calls:
            raise ValueError(
                "recording: expected predictions of solves, got none; solve with sampler.record(recording)"
            )
        names = set[str].intersection(*(set(pooled) for *_, pooled in calls))
        x, t, prediction = (torch.cat(parts) for parts in zip(*(call[:3] for call in calls)))
        shapes = {name: {call[3][name].shape[1:] for call in calls} for name in sorted(names)}
        pooled = {
            name: torch.cat([call[3][name] for call in calls]) for name, kinds in shapes.items() if len(kinds) == 1
        }
        return x.float(), t, prediction.float(), pooled


class RecordedModel:
    """A model whose predictions are kept; in everything else the model itself."""

    def __init__(self, model: Model, recording: Recording) -> None:
        self.model, self.recording = model, recording
        self.base_model = base_of(model)  # what a planner knows of it stays true

    def __getattr__(self, name: str) -> Any:
        if name == "model":  # a copy that is being made does not have it yet
            raise AttributeError(name)
        return getattr(self.model, name)

    def __call__(self, x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        kept = x.detach().to("cpu", copy=True)  # the model may write to its input
        prediction: Tensor = unwrap_output(self.model(x, t, **kwargs))
        self.recording.add(kept, t, prediction, without_marks(kwargs))
        return prediction
