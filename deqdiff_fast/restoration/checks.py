"""Checks of what a restorer is given."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..operators import Inpaint, Operator, estimate_sigma

LARGEST = 50.0  # of A^+ y: far beyond pixels in [-1, 1] and any latents, below pixels in bytes


def noise_level(sigma: Any) -> Tensor | None:
    """() or (B,) float64, or None for an estimate. Raises ValueError, TypeError."""
    if sigma is None:
        return None
    if isinstance(sigma, bool) or not isinstance(sigma, (int, float, Tensor)):
        raise TypeError(f"sigma: expected a number >= 0, a tensor (B,) or None, got {type(sigma).__name__}")
    level = torch.as_tensor(sigma, dtype=torch.float64).detach().cpu()
    if level.dim() > 1 or not bool((level.isfinite() & (level >= 0)).all()):
        raise ValueError(f"sigma: expected finite values >= 0, one or (B,), got {sigma!r}")
    return level


def noise_factor(temperature: Any) -> float:
    """A finite number >= 0. Raises ValueError for anything else."""
    number = isinstance(temperature, (int, float)) and not isinstance(temperature, bool)
    if not number or not 0 <= temperature < math.inf:
        raise ValueError(f"temperature: expected a finite number >= 0, got {temperature!r}")
    return float(temperature)


def check_measurements(y: Any, operator: Operator, sigma: Tensor | None) -> tuple[Tensor, Tensor]:
    """(measurements in float32 or float64, (B,) standard deviation of their noise). Raises ValueError, TypeError."""
    if not isinstance(y, Tensor):
        raise TypeError(f"y: expected a tensor (B, ...), got {type(y).__name__}")
    if y.dim() < 2 or 0 in y.shape:
        raise ValueError(f"y: expected measurements (B, ...) of at least one sample, got shape {tuple(y.shape)}")
    if not y.is_floating_point():
        hint = "; scale pixels to [-1, 1] first" if y.dtype == torch.uint8 else ""
        raise ValueError(f"y: expected a floating-point dtype, got {y.dtype}{hint}")
    y = y if y.dtype == torch.float64 else y.float()
    seen = operator.A_adjoint(y.detach()).flatten(1).isfinite().all(1)  # what is not measured may be anything
    if not bool(seen.all()):
        raise ValueError(
            f"y: expected finite measurements, got NaN or Inf in sample {int((~seen).int().argmax())}; leave out what "
            "was not measured with a mask (operators.Inpaint)"
        )
    y = torch.where(y.isfinite(), y, 0)
    noisy = sigma is None or bool((sigma > 0).any())
    largest = _image_like(operator, y.detach(), noisy).flatten(1).abs().amax(1)
    if bool((largest > LARGEST).any()):
        hint = (
            "scale them"
            if noisy
            else "scale them, or give the sigma of their noise, which the pseudo-inverse amplifies"
        )
        raise ValueError(
            f"y: expected measurements of images in [-1, 1], far within {LARGEST:g}, got such of an image with values "
            f"of {float(largest.max()):.3g} (sample {int(largest.argmax())}); {hint}"
        )
    if sigma is None:
        return y, _estimated(y.detach(), operator).to(y)
    if sigma.dim() and len(sigma) != len(y):
        raise ValueError(f"sigma: expected one number or {len(y)}, one for each sample, got {len(sigma)}")
    level = sigma.to(y).expand(len(y))
    return y, level


def _image_like(operator: Operator, y: Tensor, noisy: bool) -> Tensor:
    """An image that was measured like this: A^+ y, or, where that would amplify noise, the best multiple of A^T y."""
    if not noisy:
        return operator.A_dagger(y)
    back = operator.A_adjoint(y)
    image = operator.A(back).flatten(1)
    size = back.flatten(1).square().sum(1) / image.square().sum(1).clamp_min(1e-30)
    return back * size.view(-1, *(1,) * (back.dim() - 1))


def _estimated(y: Tensor, operator: Operator) -> Tensor:
    """(B,) from measurements that are images, see `estimate_sigma`; raises ValueError for others."""
    if y.dim() != 4:
        raise ValueError(
            f"sigma: expected a number, for only measurements (B, C, H, W) tell it; got None and {tuple(y.shape)}"
        )
    sigma = estimate_sigma(y, operator.mask) if isinstance(operator, Inpaint) else estimate_sigma(y)
    if not bool(sigma.isfinite().all()):
        raise ValueError("sigma: expected a number, for these measurements do not tell it; got None")
    return sigma


def check_noise_for(noise: Any, shape: tuple[int, ...], y: Tensor) -> None:
    """Raises ValueError for an initial state that does not fit."""
    if not isinstance(noise, Tensor) or tuple(noise.shape) != shape or noise.device != y.device:
        got = f"{tuple(noise.shape)} on {noise.device}" if isinstance(noise, Tensor) else type(noise).__name__
        raise ValueError(f"noise: expected shape {shape} on {y.device}, as the measurements' images have, got {got}")
