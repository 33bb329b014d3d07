"""Composition: one operator after the other."""

from __future__ import annotations

import copy
from functools import reduce

import torch
from torch import Tensor

from .base import Operator, Shape
from .conjugate import least_squares
from .delegate import Delegate
from .separable import Separable


class Compose(Delegate):
    """A = last ... second first: `Compose(Blur.gaussian(1.0), Downsample(2))` blurs, then averages blocks.

    Where all of them are products of matrices along the axes (`Operator.axis_matrices`: averages, bicubic
    downsampling, colorization, blurs whose kernel is a product) so is their composition, and it has an exact
    decomposition. Otherwise A_dagger is found by conjugate gradients, `decomposed` is False, and operators that are
    badly conditioned need many steps.

    Args:
        operators: at least one, in the order in which they are applied.
        tol: of the conjugate gradients, relative; at most `max_steps` of them.
        max_steps: see there.
        rtol: singular values of at most this times the largest count as zero, None: see `Operator.cutoff`.

    Raises:
        ValueError: there is none.
    """

    def __init__(
        self, *operators: Operator, tol: float = 1e-6, max_steps: int = 500, rtol: float | None = None
    ) -> None:
        if not operators or not all(isinstance(operator, Operator) for operator in operators):
            raise ValueError(f"operators: expected one or more of them, got {[type(o).__name__ for o in operators]}")
        self.operators = operators
        product = all(operator.is_product for operator in operators)
        super().__init__(_Product(operators, rtol) if product else _Chain(operators, tol, max_steps))


class _Product(Separable):
    """Operators that are all products of matrices along the axes."""

    def __init__(self, operators: tuple[Operator, ...], rtol: float | None) -> None:
        super().__init__()
        self.operators, self.rtol = operators, rtol
        self.per_sample = any(operator.per_sample for operator in operators)

    def axis_matrices(self, x_shape: Shape) -> tuple[Tensor | None, ...]:
        whole: list[Tensor | None] = [None, None, None]
        shape = list(x_shape)
        for operator in self.operators:
            matrices = operator.axis_matrices(tuple(shape))
            assert matrices is not None
            for number, matrix in enumerate(matrices):
                if matrix is not None:
                    before = whole[number]
                    whole[number] = matrix if before is None else matrix @ before
                    shape[number + 1] = matrix.shape[-2]
        return tuple(whole)

    def input_shape(self, y_shape: Shape) -> tuple[int, ...]:
        return reduce(lambda shape, operator: operator.input_shape(shape), reversed(self.operators), tuple(y_shape))


class _Chain(Operator):
    """Operators one after the other, with the pseudo-inverse by conjugate gradients."""

    def __init__(self, operators: tuple[Operator, ...], tol: float, max_steps: int) -> None:
        self.operators, self.tol, self.max_steps = operators, tol, max_steps
        self.accuracy = tol
        self.per_sample = any(operator.per_sample for operator in operators)

    def A(self, x: Tensor) -> Tensor:
        return reduce(lambda state, operator: operator.A(state), self.operators, x)

    def A_adjoint(self, y: Tensor) -> Tensor:
        return reduce(lambda state, operator: operator.A_adjoint(state), reversed(self.operators), y)

    def A_dagger(self, y: Tensor) -> Tensor:
        working = y.to(torch.float32) if y.dtype in (torch.float16, torch.bfloat16) else y
        found = least_squares(self.A, self.A_adjoint, working, tol=self.tol, max_steps=self.max_steps)
        return found.to(y.dtype)

    def input_shape(self, y_shape: Shape) -> tuple[int, ...]:
        return reduce(lambda shape, operator: operator.input_shape(shape), reversed(self.operators), tuple(y_shape))

    def for_samples(self, index: Tensor) -> Operator:
        chosen = tuple(operator.for_samples(index) for operator in self.operators)
        if all(a is b for a, b in zip(chosen, self.operators)):
            return self
        other = copy.copy(self)
        other.operators = chosen
        return other


__all__ = ["Compose"]
