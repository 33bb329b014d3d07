"""The base class of linear measurement operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Shape = Sequence[int]


class Operator:
    """A linear map of images x (B, C, H, W) to measurements y (B, ...), with its adjoint and its pseudo-inverse.

    All maps are linear, work on batches whose rows do not know each other, follow the device and dtype of what they are
    given, and can be differentiated by torch. With `decomposed` there is a singular value decomposition
    A = U diag(s) V^T, V orthonormal on all of x; a subclass then gives `V_adjoint`, `V`, `U_adjoint`, `U` and
    `singular_values`, and A, A_adjoint and A_dagger follow where it has no faster way. Without it a subclass gives
    these three.

    Singular values of at most `rtol` times the largest count as zero: `singular_values` gives 0 there, A_dagger and
    U_adjoint leave them out. So A = U diag(s) V^T holds to `rtol` of its norm.
    """

    decomposed: bool = False
    """Whether there are singular vectors."""

    rtol: float | None = None
    """Relative size below which singular values count as zero; None: see `cutoff`."""

    accuracy: float = 0.0
    """Relative error of A_dagger beyond rounding, where it is found by iterations."""

    per_sample: bool = False
    """Whether samples have operators of their own; `for_samples` then gives those of some of them."""

    is_product: bool = False
    """Whether `axis_matrices` gives matrices."""

    def A(self, x: Tensor) -> Tensor:
        """The measurements (B, ...) of images (B, C, H, W), without noise."""
        return self.U(self._values(x.shape, x) * self.V_adjoint(x))

    def A_adjoint(self, y: Tensor) -> Tensor:
        """The transpose: <A x, y> = <x, A_adjoint y>. y: (B, ...) -> (B, C, H, W)."""
        return self.V(self._values(self.input_shape(y.shape), y) * self.U_adjoint(y))

    def A_dagger(self, y: Tensor) -> Tensor:
        """The Moore-Penrose pseudo-inverse: of all x with the smallest ||A x - y||, the smallest. (B, C, H, W)."""
        return self.V(invert(self._values(self.input_shape(y.shape), y)) * self.U_adjoint(y))

    def V_adjoint(self, x: Tensor) -> Tensor:
        """Coefficients c = V^T x (B, ...) of images (B, C, H, W) in the right singular vectors, real; ||c|| = ||x||."""
        raise self._no_decomposition()

    def V(self, c: Tensor) -> Tensor:
        """Images (B, C, H, W) of coefficients, the inverse of `V_adjoint`."""
        raise self._no_decomposition()

    def U_adjoint(self, y: Tensor) -> Tensor:
        """Coefficients U^T y of measurements, in the coordinates and of the shape of `V_adjoint`'s; 0 where s is 0."""
        raise self._no_decomposition()

    def U(self, c: Tensor) -> Tensor:
        """Measurements of coefficients; those where s is 0 are not read."""
        raise self._no_decomposition()

    def singular_values(self, x_shape: Shape, device: torch.device | str, dtype: torch.dtype) -> Tensor:
        """Singular values s >= 0 for images of a shape (B, C, H, W); broadcastable to the coefficients."""
        raise self._no_decomposition()

    def input_shape(self, y_shape: Shape) -> tuple[int, ...]:
        """The shape (B, C, H, W) of the images that measurements of shape (B, ...) are of."""
        return tuple(self.A_adjoint(torch.zeros(tuple(y_shape), device="cpu")).shape)

    def for_samples(self, index: Tensor) -> Operator:
        """The operator of some samples. index: (n,) int64 numbers of samples -> rows of n; itself if all share one."""
        return self

    def axis_matrices(self, x_shape: Shape) -> tuple[Tensor | None, ...] | None:
        """Float64 matrices (m, n) on the host along C, H and W (None: identity) whose Kronecker product this is.

        None where it is no such product. Operators that have them compose to one that has them.
        """
        return None

    def cutoff(self, dtype: torch.dtype) -> float:
        """`rtol`, or else the square root of the dtype's epsilon (of float32's for shorter ones)."""
        # Rounding in A is amplified by 1 / s in A_dagger: with the square root both errors are of the same size.
        return float(torch.finfo(compute_dtype(dtype)).eps ** 0.5) if self.rtol is None else self.rtol

    def _values(self, x_shape: Shape, like: Tensor) -> Tensor:
        return self.singular_values(x_shape, like.device, compute_dtype(like.dtype)).to(like.dtype)

    def _no_decomposition(self) -> NotImplementedError:
        return NotImplementedError(f"{type(self).__name__} has no singular value decomposition (decomposed is False)")


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that transforms are made in: float32 for shorter ones."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def invert(values: Tensor) -> Tensor:
    """1 / s where s > 0, 0 elsewhere."""
    positive = values > 0
    return torch.where(positive, 1 / torch.where(positive, values, 1), 0)


def check_images(x: Any, who: str) -> None:
    """Raise unless x is a floating tensor (B, C, H, W)."""
    if not isinstance(x, Tensor) or x.dim() != 4 or not x.is_floating_point():
        got = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{who}: expected a floating tensor (B, C, H, W), got {got}")


def per_device(cache: dict[Any, Tensor], tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """`tensor` there, copied once."""
    key = (device, dtype)
    if key not in cache:
        with torch.inference_mode(False):  # kept for solves with gradients
            cache[key] = tensor.to(dtype, copy=True).to(device)
    return cache[key]


__all__ = ["Operator"]
