"""Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598), as the pipelines of diffusers compute it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...model.guidance import combine


@dataclass(frozen=True)
class Guidance:
    """scale and rescale as in diffusers; positive_first: the halves come as (with prompt, without)."""

    scale: float
    rescale: float
    positive_first: bool

    def combine(self, parts: list[Tensor]) -> Tensor:
        """The prediction from one part (no guidance) or two, each (n, *shape)."""
        if len(parts) == 1:
            return parts[0]
        positive, negative = parts if self.positive_first else reversed(parts)
        return combine(negative, positive, self.scale, self.rescale)
