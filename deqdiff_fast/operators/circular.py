"""Convolution with periodic borders, by Fourier transforms."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._devices import with_torch_defaults
from .base import Operator, Shape, check_images, compute_dtype
from .convolution import check_kernel_fits, convolution_matrices


class Spectrum(NamedTuple):
    """A transfer function on one grid."""

    values: Tensor  # its size, (1 or B, 1 or C, H, W), those of at most the cutoff are 0
    phase: Tensor  # complex, of size 1, 0 where the value is
    transfer: Tensor  # itself


class Circular(Operator):
    """y = kernel * x, periodic, for any kernels (1 or B, 1 or C, h, w) in float64 on the host.

    The right singular vectors are the Hartley basis cos + sin, so that coefficients are real; the left ones are those,
    turned by the phase of the transfer function.
    """

    decomposed = True

    def __init__(self, kernel: Tensor, factors: tuple[Tensor, Tensor] | None, rtol: float | None) -> None:
        self.kernel, self.factors, self.rtol = kernel, factors, rtol
        self.per_sample, self.is_product = len(kernel) > 1, factors is not None
        self._cache: dict[Any, Spectrum] = {}
        self._selected: tuple[Circular, Tensor] | None = None

    def A(self, x: Tensor) -> Tensor:
        """The blurred images, of the shape of x."""
        return self._filtered(x, lambda spectrum: spectrum.transfer, "A")

    def A_adjoint(self, y: Tensor) -> Tensor:
        """The transpose: the correlation with the kernel."""
        return self._filtered(y, lambda spectrum: spectrum.transfer.conj(), "A_adjoint")

    def V_adjoint(self, x: Tensor) -> Tensor:
        """Coefficients in the Hartley basis, of the shape of x."""
        check_images(x, "Blur.V_adjoint")
        found = torch.fft.fft2(x.to(compute_dtype(x.dtype)), norm="ortho")
        return _hartley(found).to(x.dtype)

    def V(self, c: Tensor) -> Tensor:
        """Images; the Hartley transform is its own inverse."""
        return self.V_adjoint(c)

    def U_adjoint(self, y: Tensor) -> Tensor:
        """Coefficients of blurred images."""
        found = self._multiplied(y, lambda spectrum: spectrum.phase.conj(), "U_adjoint")
        return (_hartley(found) / math.sqrt(y.shape[2] * y.shape[3])).to(y.dtype)

    def U(self, c: Tensor) -> Tensor:
        """Blurred images of coefficients."""
        return self._filtered(self.V(c), lambda spectrum: spectrum.phase, "U")

    def singular_values(self, x_shape: Shape, device: torch.device | str, dtype: torch.dtype) -> Tensor:
        """(1 or B, 1 or C, H, W): the size of the transfer function."""
        return self._spectrum(tuple(x_shape)[2:], torch.device(device), dtype).values

    def input_shape(self, y_shape: Shape) -> tuple[int, ...]:
        """The measurements' own."""
        return tuple(y_shape)

    def axis_matrices(self, x_shape: Shape) -> tuple[Tensor | None, ...] | None:
        """Circulant matrices along H and W where the kernel is a product."""
        return None if self.factors is None else convolution_matrices(self.factors, x_shape, "circular")

    def for_samples(self, index: Tensor) -> Circular:
        """With the kernels of some samples; itself where they share one."""
        if not self.per_sample:
            return self
        chosen = copy.copy(self)
        chosen.factors, chosen.is_product = None, False
        chosen._cache, chosen._selected = {}, (self, index)
        return chosen

    def _filtered(self, x: Tensor, multiplier: Callable[[Spectrum], Tensor], what: str) -> Tensor:
        filtered: Tensor = torch.fft.ifft2(self._multiplied(x, multiplier, what))
        return filtered.real.to(x.dtype)

    def _multiplied(self, x: Tensor, multiplier: Callable[[Spectrum], Tensor], what: str) -> Tensor:
        """The Fourier transform of x times a multiplier that is chosen from the `Spectrum`."""
        check_images(x, f"Blur.{what}")
        working = x.to(compute_dtype(x.dtype))
        factor = multiplier(self._spectrum(tuple(x.shape[2:]), x.device, working.dtype))
        if len(factor) not in (1, len(x)) or factor.shape[1] not in (1, x.shape[1]):
            raise ValueError(
                f"Blur.{what}: there are kernels for {len(factor)} samples and {factor.shape[1]} channels, images "
                f"{tuple(x.shape)} came; for_samples(index) gives the operator of some samples"
            )
        transformed: Tensor = torch.fft.fft2(working)
        return transformed * factor

    def _spectrum(self, size: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Spectrum:
        """The transfer function for images (H, W), from the cache or made."""
        key = (size, device, dtype)
        found = self._cache.get(key)
        if found is None:
            if self._selected is not None:
                whole, index = self._selected
                parts = whole._spectrum(size, device, dtype)
                found = Spectrum(*(part.index_select(0, index.to(device)) for part in parts))
            else:
                found = self._make(size, device, dtype)
            self._cache[key] = found
        return found

    @with_torch_defaults
    @torch.inference_mode(False)  # kept for solves with gradients
    def _make(self, size: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Spectrum:
        height, width = self.kernel.shape[2:]
        check_kernel_fits((height, width), size)
        whole = torch.nn.functional.pad(self.kernel, (0, size[1] - width, 0, size[0] - height))
        transfer = torch.fft.fft2(whole.roll((-(height // 2), -(width // 2)), (2, 3)))
        values = transfer.abs()
        active = values > self.cutoff(dtype) * values.amax((1, 2, 3), keepdim=True)
        phase = torch.where(active, transfer / torch.where(active, values, 1), 0)
        values = torch.where(active, values, 0).to(dtype).to(device)
        turned = torch.complex64 if dtype == torch.float32 else torch.complex128
        return Spectrum(values, *(part.to(turned).to(device) for part in (phase, transfer)))


def _hartley(fourier: Tensor) -> Tensor:
    """The Hartley transform of a real signal from its Fourier transform."""
    return fourier.real - fourier.imag


__all__ = ["Circular"]
