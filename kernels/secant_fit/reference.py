"""Reference of the fit of secants, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def secant_fit(
    fit: Tensor, gram: Tensor, size: Tensor, count: Tensor, ridges: Tensor, guess_error: Tensor | None, floor: float,
    guessed: float, nonlinear: float,
) -> None:  # fmt: skip
    """fit <- Z (Z gram Z + ridge)^-1 Z of every row, Z the inverse lengths of the columns kept, 0 for the others."""
    gram, ridges = gram.double(), ridges.double().T
    length = gram.diagonal(dim1=1, dim2=2).sqrt()
    keep = (length > floor * size.double()[:, None]) & length.isfinite()
    keep &= torch.arange(1, gram.shape[1] + 1, device=gram.device) < count[:, None]
    if guess_error is not None:  # against what the step may have changed beside the slope
        error = guess_error.double()[:, None] / (nonlinear * length).clamp_min(1e-300)
        ridges = torch.where(ridges > guessed, torch.maximum(ridges, error.square()), ridges)
    scale = torch.where(keep, 1 / length.clamp_min(1e-300), 0)
    system = gram.nan_to_num(0.0, 0.0, 0.0) * scale[:, :, None] * scale[:, None]
    system.diagonal(dim1=1, dim2=2).add_(torch.where(keep, ridges, 1.0))
    factor, _ = torch.linalg.cholesky_ex(system)
    found = torch.cholesky_inverse(factor) * scale[:, :, None] * scale[:, None]
    fit.copy_(torch.where(found.isfinite().all(2, keepdim=True).all(1, keepdim=True), found, 0.0))
