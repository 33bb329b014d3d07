"""Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598), as the pipelines of diffusers compute it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Guidance:
    """scale and rescale as in diffusers; positive_first: the halves come as (with prompt, without)."""

    scale: float
    rescale: float
    positive_first: bool

    def combine(self, parts: list[Tensor]) -> Tensor:
        """The prediction from one part (no guidance) or two: negative + scale (positive - negative), each (n, *shape).

        rescale: the share of a version that has the positive part's standard deviation, sample by sample (Lin et al.
        2023, arXiv 2305.08891, section 3.4).
        """
        if len(parts) == 1:
            return parts[0]
        positive, negative = parts if self.positive_first else reversed(parts)
        guided = negative + self.scale * (positive - negative)
        if self.rescale > 0.0:
            over = tuple(range(1, guided.dim()))
            ratio = positive.std(dim=over, keepdim=True) / guided.std(dim=over, keepdim=True)
            guided = self.rescale * (guided * ratio) + (1 - self.rescale) * guided
        return guided
