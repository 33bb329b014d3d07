"""An operator whose work another one does."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from .base import Operator, Shape


class Delegate(Operator):
    """Everything is done by `form`, an operator that was chosen when this one was made."""

    form: Operator
    """The operator that does the work."""

    def __init__(self, form: Operator) -> None:
        self.form = form
        self.decomposed, self.per_sample, self.is_product = form.decomposed, form.per_sample, form.is_product
        self.accuracy = form.accuracy

    def A(self, x: Tensor) -> Tensor:
        """The measurements of images (B, C, H, W)."""
        return self.form.A(x)

    def A_adjoint(self, y: Tensor) -> Tensor:
        """The transpose."""
        return self.form.A_adjoint(y)

    def A_dagger(self, y: Tensor) -> Tensor:
        """The pseudo-inverse."""
        return self.form.A_dagger(y)

    def V_adjoint(self, x: Tensor) -> Tensor:
        """Coefficients of images."""
        return self.form.V_adjoint(x)

    def V(self, c: Tensor) -> Tensor:
        """Images of coefficients."""
        return self.form.V(c)

    def U_adjoint(self, y: Tensor) -> Tensor:
        """Coefficients of measurements."""
        return self.form.U_adjoint(y)

    def U(self, c: Tensor) -> Tensor:
        """Measurements of coefficients."""
        return self.form.U(c)

    def singular_values(self, x_shape: Shape, device: torch.device | str, dtype: torch.dtype) -> Tensor:
        """Those of `form`."""
        return self.form.singular_values(x_shape, device, dtype)

    def input_shape(self, y_shape: Shape) -> tuple[int, ...]:
        """The shape of the images that measurements are of."""
        return self.form.input_shape(y_shape)

    def axis_matrices(self, x_shape: Shape) -> tuple[Tensor | None, ...] | None:
        """Those of `form`."""
        return self.form.axis_matrices(x_shape)

    def cutoff(self, dtype: torch.dtype) -> float:
        """That of `form`."""
        return self.form.cutoff(dtype)

    def for_samples(self, index: Tensor) -> Operator:
        """The operator of some samples; itself if all share one."""
        form = self.form.for_samples(index)
        if form is self.form:
            return self
        chosen = copy.copy(self)
        chosen.form = form
        return chosen


__all__ = ["Delegate"]
