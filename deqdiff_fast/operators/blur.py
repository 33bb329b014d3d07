"""Deblurring: convolution with a known kernel."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._devices import with_torch_defaults
from .circular import Circular
from .convolution import PADDINGS, check_kernel_fits, convolution_matrices, kernel_factors
from .delegate import Delegate
from .separable import Separable


class Blur(Delegate):
    """y = kernel * x, a convolution; the centre of a kernel of h x w pixels is its pixel (h // 2, w // 2).

    With `padding="circular"` any kernel is allowed and everything goes by Fourier transforms. With the others the
    kernel must be a product of a column and a row, and everything goes by a small singular value decomposition along
    each axis.

    Args:
        kernel: (h, w), or (1 or B, 1 or C, h, w) with one for each sample or channel, at most as large as the images.
        padding: what lies outside of the image: "circular", "reflect" (mirrored), "replicate" (the border's value),
            "constant" (0); or "valid": only where the kernel lies inside is measured, (B, C, H - h + 1, W - w + 1).
        rtol: singular values of at most this times the largest count as zero, None: see `Operator.cutoff`. Those that
            are far below the noise only amplify it.

    Raises:
        ValueError: no such padding; a kernel that is NaN, infinite or zero; one that is no product without
            `padding="circular"`; or, when it is used, one that is larger than the images.
    """

    @with_torch_defaults
    def __init__(self, kernel: Tensor, padding: str = "circular", *, rtol: float | None = None) -> None:
        if padding not in PADDINGS:
            raise ValueError(f"padding: expected one of {', '.join(PADDINGS)}, got {padding!r}")
        if rtol is not None and not 0 <= rtol < 1:
            raise ValueError(f"rtol: expected a number from 0 to 1 (below), or None, got {rtol!r}")
        self.kernel = _checked(kernel)
        """(1 or B, 1 or C, h, w) float64, on the host."""
        self.padding = padding
        # a kernel in float32 is a product to float32's rounding
        factors = kernel_factors(self.kernel, 1e-12 if kernel.dtype == torch.float64 else 1e-6)
        if padding != "circular" and factors is None:
            raise ValueError(
                f"kernel: padding {padding!r} needs one that is a product of a column and a row; "
                'padding="circular" takes every kernel'
            )
        if padding == "circular" or factors is None:
            super().__init__(Circular(self.kernel, factors, rtol))
        else:
            super().__init__(_SeparableBlur(factors, padding, rtol))

    @classmethod
    @with_torch_defaults
    def gaussian(
        cls,
        std: float | tuple[float, float],
        size: int | None = None,
        angle: float = 0.0,
        padding: str = "circular",
        *,
        rtol: float | None = None,
    ) -> Blur:
        """A Gaussian kernel, isotropic or not.

        Args:
            std: in pixels; a pair (along rows' direction of counting, along columns') is anisotropic: the first is
                along the height where the angle is 0.
            size: of the kernel, odd; None: three standard deviations on each side.
            angle: by which it is turned, in degrees; other than a multiple of 90 it needs `padding="circular"`.
            padding: as for `Blur`.
            rtol: as for `Blur`.
        """
        pair = (float(std), float(std)) if isinstance(std, (int, float)) else (float(std[0]), float(std[1]))
        if not all(0 < s < math.inf for s in pair):
            raise ValueError(f"std: expected numbers > 0, got {std!r}")
        side = 2 * math.ceil(3 * max(pair)) + 1 if size is None else size
        if side < 1 or side % 2 == 0:
            raise ValueError(f"size: expected an odd number, got {size!r}")
        offset = torch.arange(side, dtype=torch.float64) - side // 2
        down, right = torch.meshgrid(offset, offset, indexing="ij")
        cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        along, across = cos * down + sin * right, cos * right - sin * down
        kernel = torch.exp(-0.5 * ((along / pair[0]) ** 2 + (across / pair[1]) ** 2))
        return cls(kernel / kernel.sum(), padding, rtol=rtol)

    @classmethod
    @with_torch_defaults
    def uniform(cls, size: int | tuple[int, int], padding: str = "circular", *, rtol: float | None = None) -> Blur:
        """The mean over `size` x `size` pixels, or over size[0] x size[1]."""
        height, width = (size, size) if isinstance(size, int) else size
        if min(height, width) < 1:
            raise ValueError(f"size: expected whole numbers >= 1, got {size!r}")
        return cls(torch.full((height, width), 1 / (height * width), dtype=torch.float64), padding, rtol=rtol)


class _SeparableBlur(Separable):
    """A blur whose kernels are products, (1 or B, 1 or C, h) and (1 or B, 1 or C, w)."""

    def __init__(self, factors: tuple[Tensor, Tensor], padding: str, rtol: float | None) -> None:
        super().__init__()
        self.factors, self.padding, self.rtol = factors, padding, rtol
        self.per_sample = len(factors[0]) > 1

    def axis_matrices(self, x_shape: tuple[int, ...]) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        check_kernel_fits([factor.shape[-1] for factor in self.factors], x_shape[2:])
        return convolution_matrices(self.factors, x_shape, self.padding)

    def input_shape(self, y_shape: tuple[int, ...]) -> tuple[int, ...]:  # type: ignore[override]
        lost = [factor.shape[-1] - 1 if self.padding == "valid" else 0 for factor in self.factors]
        return (*y_shape[:2], y_shape[2] + lost[0], y_shape[3] + lost[1])


def _checked(kernel: Tensor) -> Tensor:
    """kernel as (1 or B, 1 or C, h, w) float64 on the host."""
    if not isinstance(kernel, Tensor) or kernel.dim() not in (2, 4) or kernel.numel() == 0 or kernel.is_complex():
        got = tuple(kernel.shape) if isinstance(kernel, Tensor) else type(kernel).__name__
        raise ValueError(f"kernel: expected a real tensor (h, w) or (1 or B, 1 or C, h, w), got {got}")
    kernel = kernel.detach().to("cpu", torch.float64)
    if not bool(kernel.isfinite().all()):
        raise ValueError("kernel: it holds NaN or infinity")
    if not bool(kernel.flatten(-2).any(-1).all()):
        raise ValueError("kernel: it is zero everywhere")
    return kernel if kernel.dim() == 4 else kernel[None, None]


__all__ = ["Blur"]
