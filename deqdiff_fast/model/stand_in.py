"""Drafts from a file, and a draft as it is called in the place of one model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._types import Model
from ..schedule.tensor_file import read_tensors, written_by
from .conv_draft import ConvDraft
from .draft import Draft


class BoundDraft:
    """A draft that is given the conditioning of a guided model, which is not among the caller's arguments."""

    def __init__(self, draft: Draft, model: Any) -> None:
        self.draft, self.bind_batch = draft, model.bind_batch

    def __call__(self, x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        prediction: Tensor = self.draft(x, t, **kwargs)
        return prediction


def stand_in(draft: Model, model: Model) -> Model:
    """The draft as it is to be called where the model is: with all that the model itself is called with."""
    return BoundDraft(draft, model) if isinstance(draft, Draft) and hasattr(model, "bind_batch") else draft


def load_draft(path: str | Path, *, device: torch.device | str = "cpu") -> Draft:
    """Read a file that `Draft.save` or `ConvDraft.save` wrote.

    Raises:
        ValueError: it is damaged, or another kind of file.
        OSError: it is not there, or may not be read.
    """
    with written_by("Draft.save or ConvDraft.save", path):
        metadata = read_tensors(path)[1]
    return (Draft if "draft" in metadata else ConvDraft).load(path, device=device)
