"""Inpainting: some pixels are measured, the others are not."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from .base import Operator, Shape, check_images, per_device


class Inpaint(Operator):
    """y = mask * x, with zeros where nothing was measured; A_dagger y = mask * y.

    Args:
        mask: bool, or zeros and ones: (H, W), (1, H, W) or (C, H, W) for all samples, (B, 1, H, W) or (B, C, H, W) for
            one mask a sample; True or 1 where a pixel is measured.

    Raises:
        ValueError: no such mask, or one (of a sample) that measures nothing.
    """

    decomposed = True

    def __init__(self, mask: Tensor) -> None:
        if not isinstance(mask, Tensor) or not 2 <= mask.dim() <= 4:
            got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"mask: expected a tensor (H, W), (C, H, W) or (B, C, H, W), got {got}")
        if mask.dtype != torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError("mask: expected bool, or zeros and ones, got other values (or NaN)")
        mask = mask.detach().to(torch.bool).reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))
        if mask.numel() == 0 or not bool(mask.flatten(1).any(1).all()):
            empty = [] if mask.numel() == 0 else (~mask.flatten(1).any(1)).nonzero().flatten().tolist()
            which = f" (sample {empty[0]})" if len(mask) > 1 and empty else ""
            raise ValueError(f"mask: empty{which}; expected at least one pixel that is measured")
        self.mask = mask
        """(1 or B, 1 or C, H, W) bool."""
        self.per_sample = len(mask) > 1
        self._copies: dict[Any, Tensor] = {}

    def A(self, x: Tensor) -> Tensor:
        """x with zeros where nothing is measured. (B, C, H, W) -> the same shape."""
        return self._masked(x, "Inpaint.A")

    def A_adjoint(self, y: Tensor) -> Tensor:
        """As `A`, which is a projection."""
        return self._masked(y, "Inpaint.A_adjoint")

    def A_dagger(self, y: Tensor) -> Tensor:
        """As `A`, which is a projection."""
        return self._masked(y, "Inpaint.A_dagger")

    def V_adjoint(self, x: Tensor) -> Tensor:
        """x itself: the singular vectors are the pixels."""
        return x

    def V(self, c: Tensor) -> Tensor:
        """c itself."""
        return c

    def U_adjoint(self, y: Tensor) -> Tensor:
        """The measured pixels, zeros elsewhere."""
        return self._masked(y, "Inpaint.U_adjoint")

    def U(self, c: Tensor) -> Tensor:
        """As `U_adjoint`."""
        return self._masked(c, "Inpaint.U")

    def singular_values(self, x_shape: Shape, device: torch.device | str, dtype: torch.dtype) -> Tensor:
        """The mask, (1 or B, 1 or C, H, W)."""
        return per_device(self._copies, self.mask, torch.device(device), dtype)

    def input_shape(self, y_shape: Shape) -> tuple[int, ...]:
        """The measurements' own."""
        return tuple(y_shape)

    def for_samples(self, index: Tensor) -> Inpaint:
        """The masks of some samples; itself where there is one mask for all."""
        if not self.per_sample:
            return self
        chosen = copy.copy(self)  # no checks: this runs between model calls
        chosen.mask = per_device(self._copies, self.mask, index.device, torch.bool).index_select(0, index)
        chosen._copies = {}
        return chosen

    def _masked(self, x: Tensor, who: str) -> Tensor:
        check_images(x, who)
        mask = per_device(self._copies, self.mask, x.device, torch.bool)
        fits = all(m in (1, n) for m, n in zip(mask.shape[:2], x.shape[:2])) and mask.shape[2:] == x.shape[2:]
        if not fits:
            raise ValueError(f"{who}: the mask is {tuple(mask.shape)}, images of shape {tuple(x.shape)} came")
        return torch.where(mask, x, 0)  # not a product: what was not measured may be NaN


__all__ = ["Inpaint"]
