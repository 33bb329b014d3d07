"""The norm in which errors are meant, where the entries of a sample do not all count the same."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from torch import Tensor

SMALLEST = 2.0**-14  # of the largest root: the model is given entries of weight zero too, so they must be found again


class Weight:
    """w of the norm sqrt(sum_j w_j x_j^2), broadcastable to a sample.

    Raises:
        TypeError: not a tensor, array or number. ValueError: values that are negative, not finite, or all zero.
    """

    def __init__(self, weight: Any) -> None:
        try:
            given = torch.as_tensor(weight).detach().to("cpu", torch.float64).clone()
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"weight: expected a tensor that can be broadcast to a sample, or None, got {type(weight).__name__}"
            ) from error
        if not bool(given.isfinite().all()) or bool((given < 0).any()) or not bool((given > 0).any()):
            raise ValueError("weight: expected finite values >= 0, one of them positive, or None")
        self.values = given
        digest = hashlib.sha256(given.contiguous().numpy().tobytes()).hexdigest()
        self.key = (tuple(given.shape), digest)
        """Tells this weight from others."""
        self._made: dict[tuple[int, ...], WeightedNorm] = {}

    @classmethod
    def given(cls, weight: Any, spectral: bool) -> Weight | None:
        """As given by a user, None for none; spectral: beside a spectrum, which is a ValueError."""
        if weight is not None and spectral:
            raise ValueError("weight: a spectrum is of samples whose entries all count the same; give one of the two")
        return None if weight is None else cls(weight)

    @torch.inference_mode(False)
    def on(self, shape: tuple[int, ...]) -> WeightedNorm:
        """The norm of samples of that shape; raises ValueError where the weight cannot be broadcast to it."""
        made = self._made.get(shape)
        if made is None:
            try:
                root = self.values.sqrt().broadcast_to(shape)
            except RuntimeError:
                raise ValueError(
                    f"weight: expected a shape that can be broadcast to a sample of shape {shape}, got "
                    f"{tuple(self.values.shape)}"
                ) from None
            made = self._made[shape] = WeightedNorm(root.reshape(math.prod(shape)))
        return made


class WeightedNorm:
    """Coordinates x_j sqrt(w_j), scaled to at most 1: their L2 norm is the weighted one of x, up to a factor.

    A solver that works in them measures states, steps and secants in that norm, and all else, affine with the same
    numbers for all entries, stays as it is.

    Args:
        root: (D,) float64, the roots of the weights.
    """

    def __init__(self, root: Tensor) -> None:
        self.scale = (root / root.max()).clamp_min(SMALLEST)
        self._ready: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def forward(self, rows: Tensor, spare: Tensor | None = None) -> Tensor:
        """(n, D) samples -> coordinates, in place. Returns rows."""
        return rows.mul_(self._on(rows)[0])

    def inverse(self, rows: Tensor, spare: Tensor | None = None) -> Tensor:
        """(n, D) coordinates -> samples, in place. Returns rows."""
        return rows.mul_(self._on(rows)[1])

    def _on(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        key = (rows.device, rows.dtype)
        if key not in self._ready:
            with torch.inference_mode(False):  # kept for solves with gradients
                self._ready[key] = (self.scale.to(*key), (1 / self.scale).to(*key))
        return self._ready[key]
