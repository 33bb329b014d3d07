"""Operators that are a Kronecker product of matrices along channels, rows and columns."""

from __future__ import annotations

import copy
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._devices import with_torch_defaults
from .base import Operator, Shape, check_images, compute_dtype

_KEPT = 16  # decompositions kept, for as many image shapes, dtypes and devices


class Axis(NamedTuple):
    """One axis: its matrix and the singular value decomposition of it; each may be (1 or B, 1 or C, ., .)."""

    matrix: Tensor  # (m, n)
    u: Tensor  # (m, n), zero columns where n > m
    v: Tensor  # (n, n)


class Decomposition(NamedTuple):
    """What images of one shape need. None stands for an identity."""

    axes: tuple[Axis | None, ...]  # along C, H, W
    values: Tensor  # broadcastable to (C, H, W) or (B, C, H, W); those of at most the cutoff are 0
    active: Tensor  # 1 where a value is above it

    def select(self, index: Tensor) -> Decomposition:
        """That of some samples, where it has one for each."""

        def chosen(part: Tensor) -> Tensor:
            return part.index_select(0, index.to(part.device)) if part.dim() == 4 and len(part) > 1 else part

        axes = tuple(axis and Axis(*map(chosen, axis)) for axis in self.axes)
        return Decomposition(axes, chosen(self.values), chosen(self.active))


class Separable(Operator):
    """A = A_C x A_H x A_W, a Kronecker product: a subclass gives the matrices, and `input_shape`.

    It works by the singular value decompositions of these small matrices alone, made on the host in float64 once for
    every shape of images. A large product of matrices is never formed.
    """

    decomposed = True
    is_product = True

    def __init__(self) -> None:
        self._cache: dict[Any, Decomposition] = {}
        self._selected: tuple[Separable, Tensor] | None = None

    def axis_matrices(self, x_shape: Shape) -> tuple[Tensor | None, ...]:
        """Float64 matrices (m, n) along C, H and W for images (B, C, H, W); None where an axis is left as it is.

        Those along H and W may be (1 or B, 1 or C, m, n), for each sample or channel its own.
        """
        raise NotImplementedError

    def A(self, x: Tensor) -> Tensor:
        """The measurements (B, C', H', W') of images (B, C, H, W)."""
        return _apply(x, [axis and axis.matrix for axis in self._of_images(x, "A").axes])

    def A_adjoint(self, y: Tensor) -> Tensor:
        """The transpose, (B, C', H', W') -> (B, C, H, W)."""
        return _apply(y, [axis and axis.matrix.mT for axis in self._of_measurements(y, "A_adjoint").axes])

    def V_adjoint(self, x: Tensor) -> Tensor:
        """Coefficients, of the shape of x."""
        return _apply(x, [axis and axis.v.mT for axis in self._of_images(x, "V_adjoint").axes])

    def V(self, c: Tensor) -> Tensor:
        """Images, of the shape of c."""
        return _apply(c, [axis and axis.v for axis in self._of_images(c, "V").axes])

    def U_adjoint(self, y: Tensor) -> Tensor:
        """Coefficients (B, C, H, W) of measurements (B, C', H', W')."""
        found = self._of_measurements(y, "U_adjoint")
        return _apply(y, [axis and axis.u.mT for axis in found.axes]) * found.active.to(y.dtype)

    def U(self, c: Tensor) -> Tensor:
        """Measurements (B, C', H', W') of coefficients (B, C, H, W)."""
        found = self._of_images(c, "U")
        return _apply(c * found.active.to(c.dtype), [axis and axis.u for axis in found.axes])

    def singular_values(self, x_shape: Shape, device: torch.device | str, dtype: torch.dtype) -> Tensor:
        """(C or 1, H or 1, W or 1), with B before them if `per_sample`: the products of the axes' singular values."""
        return self._decomposition(tuple(x_shape), torch.device(device), dtype).values

    def for_samples(self, index: Tensor) -> Separable:
        """The operator of some samples; itself unless `per_sample`."""
        if not self.per_sample:
            return self
        chosen = copy.copy(self)
        chosen._cache, chosen._selected = {}, (self, index)
        return chosen

    def _of_images(self, x: Tensor, what: str) -> Decomposition:
        who = f"{type(self).__name__.lstrip('_')}.{what}"
        check_images(x, who)
        found = self._decomposition(tuple(x.shape), x.device, compute_dtype(x.dtype))
        if found.values.dim() == 4 and len(found.values) not in (1, len(x)):
            raise ValueError(
                f"{who}: it is for {len(found.values)} samples, {len(x)} rows came; for_samples(index) gives the "
                "operator of some of them"
            )
        if found.values.shape[-3] not in (1, x.shape[1]):
            raise ValueError(f"{who}: it is for {found.values.shape[-3]} channels, {x.shape[1]} came")
        return found

    def _of_measurements(self, y: Tensor, what: str) -> Decomposition:
        check_images(y, f"{type(self).__name__.lstrip('_')}.{what}")
        return self._of_images(y.new_empty(()).expand(self.input_shape(y.shape)), what)

    def _decomposition(self, x_shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Decomposition:
        """The decomposition for images (B, C, H, W), from the cache or made."""
        key = (x_shape[1:], device, dtype)
        found = self._cache.get(key)
        if found is None:
            if self._selected is not None:
                whole, index = self._selected
                found = whole._decomposition(x_shape, device, dtype).select(index)
            else:
                found = self._make(x_shape, device, dtype)
            if len(self._cache) >= _KEPT:
                self._cache.clear()
            self._cache[key] = found
        return found

    @with_torch_defaults
    @torch.inference_mode(False)  # kept for solves with gradients
    def _make(self, x_shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Decomposition:
        return decompose(self.axis_matrices(x_shape), self.cutoff(dtype), device, dtype)


def decompose(
    matrices: tuple[Tensor | None, ...], cutoff: float, device: torch.device, dtype: torch.dtype
) -> Decomposition:
    """Singular value decompositions of float64 matrices along C, H and W."""
    axes: list[Axis | None] = []
    singular = [torch.ones((1, 1, 1), dtype=torch.float64)]
    for number, matrix in enumerate(matrices):
        if matrix is None:
            axes.append(None)
            continue
        u, s, vt = torch.linalg.svd(matrix, full_matrices=True)
        m, n = matrix.shape[-2:]
        u, s = (torch.nn.functional.pad(part[..., :n], (0, max(n - m, 0))) for part in (u, s))
        axes.append(Axis(*(part.to(dtype).to(device) for part in (matrix, u, vt.mT))))
        singular.append(s.reshape(*s.shape, *[1] * (2 - number)) if number != 2 else s.unsqueeze(-2))
    values = reduce(torch.mul, singular)
    active = values > cutoff * values.amax((-3, -2, -1), keepdim=True)
    values = torch.where(active, values, 0)
    return Decomposition(tuple(axes), *(part.to(dtype).to(device) for part in (values, active)))


def _apply(x: Tensor, matrices: list[Tensor | None]) -> Tensor:
    """Matrices (m, n) along C, H and W of x (B, C, H, W)."""
    channel, row, column = matrices
    result = x.to(compute_dtype(x.dtype))
    if column is not None:
        result = result @ column.mT
    if row is not None:
        result = row @ result
    if channel is not None:
        result = torch.einsum("dc,bchw->bdhw", channel, result)
    return result.to(x.dtype)


__all__ = ["Separable"]
