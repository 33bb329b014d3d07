"""Operators that are a Kronecker product of matrices along channels, rows and columns."""

from __future__ import annotations

from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .base import Operator, Shape, check_images, compute_dtype

_KEPT = 16  # decompositions kept, for as many image shapes, dtypes and devices


class Axis(NamedTuple):
    """One axis: its matrix and the singular value decomposition of it. None stands for the identity."""

    matrix: Tensor  # (m, n)
    u: Tensor  # (m, n), zero columns where n > m
    v: Tensor  # (n, n)


class Decomposition(NamedTuple):
    axes: tuple[Axis | None, ...]  # along C, H, W
    values: Tensor  # broadcastable to (C, H, W), those of at most the cutoff are 0
    active: Tensor  # 1 where a value is above it


class Separable(Operator):
    """A = A_C x A_H x A_W: a subclass gives the matrices. By singular value decompositions of these alone.

    The decompositions are made on the host in float64, once for every shape of images.
    """

    decomposed = True

    def __init__(self) -> None:
        self._cache: dict[Any, Decomposition] = {}

    def axis_matrices(self, x_shape: Shape) -> tuple[Tensor | None, ...]:
        """Float64 matrices (m, n) along C, H and W for images (B, C, H, W); None where an axis is left as it is."""
        raise NotImplementedError

    def A(self, x: Tensor) -> Tensor:
        """The measurements (B, C', H', W') of images (B, C, H, W)."""
        check_images(x, f"{type(self).__name__}.A")
        return self._apply(x, [axis and axis.matrix for axis in self._decomposition(x.shape, x).axes])

    def A_adjoint(self, y: Tensor) -> Tensor:
        """The transpose, (B, C', H', W') -> (B, C, H, W)."""
        return self._apply(y, [axis and axis.matrix.mT for axis in self._of_measurements(y, "A_adjoint").axes])

    def V_adjoint(self, x: Tensor) -> Tensor:
        """Coefficients, of the shape of x."""
        check_images(x, f"{type(self).__name__}.V_adjoint")
        return self._apply(x, [axis and axis.v.mT for axis in self._decomposition(x.shape, x).axes])

    def V(self, c: Tensor) -> Tensor:
        """Images, of the shape of c."""
        return self._apply(c, [axis and axis.v for axis in self._decomposition(c.shape, c).axes])

    def U_adjoint(self, y: Tensor) -> Tensor:
        """Coefficients (B, C, H, W) of measurements (B, C', H', W')."""
        found = self._of_measurements(y, "U_adjoint")
        return self._apply(y, [axis and axis.u.mT for axis in found.axes]) * found.active.to(y.dtype)

    def U(self, c: Tensor) -> Tensor:
        """Measurements (B, C', H', W') of coefficients (B, C, H, W)."""
        found = self._decomposition(c.shape, c)
        return self._apply(c * found.active.to(c.dtype), [axis and axis.u for axis in found.axes])

    def singular_values(self, x_shape: Shape, device: torch.device | str, dtype: torch.dtype) -> Tensor:
        """(C or 1, H or 1, W or 1): the products of the axes' singular values."""
        return self._decompose(tuple(x_shape)[1:], torch.device(device), dtype).values

    def _of_measurements(self, y: Tensor, what: str) -> Decomposition:
        check_images(y, f"{type(self).__name__}.{what}")
        return self._decomposition(self.input_shape(y.shape), y)

    def _decomposition(self, x_shape: Shape, like: Tensor) -> Decomposition:
        return self._decompose(tuple(x_shape)[1:], like.device, compute_dtype(like.dtype))

    def _decompose(self, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Decomposition:
        """The decomposition for images (C, H, W), from the cache or made."""
        key = (shape, device, dtype)
        if key not in self._cache:
            if len(self._cache) >= _KEPT:
                self._cache.clear()
            self._cache[key] = self._make(shape, device, dtype)
        return self._cache[key]

    def _make(self, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Decomposition:
        axes: list[Axis | None] = []
        singular: list[Tensor] = []
        for number, matrix in enumerate(self.axis_matrices((1, *shape))):
            along = [1, 1, 1]
            if matrix is None:
                axes.append(None)
                singular.append(torch.ones(along, dtype=torch.float64))
                continue
            u, s, vt = torch.linalg.svd(matrix, full_matrices=True)
            m, n = matrix.shape
            u, s = (torch.nn.functional.pad(part[..., :n], (0, max(n - m, 0))) for part in (u, s))
            axes.append(Axis(*(part.to(device=device, dtype=dtype) for part in (matrix, u, vt.mT))))
            along[number] = n
            singular.append(s.reshape(along))
        values = reduce(torch.mul, singular)
        active = values > self.cutoff(dtype) * values.max()
        values = torch.where(active, values, 0).to(device=device, dtype=dtype)
        return Decomposition(tuple(axes), values, active.to(device=device, dtype=dtype))

    @staticmethod
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
