"""The spectral radius of df/dz by power iteration, for each sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def spectral_radius(f: Callable[[Tensor], Any], z: Tensor, iterations: int = 50) -> Tensor:
    """(B,) from z: (B, *shape). The geometric mean of the growth, so that complex pairs of eigenvalues count too.

    Raises:
        ValueError: iterations < 2.
    """
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 2:
        raise ValueError(f"iterations: expected an int >= 2, got {iterations!r}")
    with torch.enable_grad():
        point = z.detach().clone().requires_grad_()
        out = f(point)
    if not out.requires_grad:
        return z.new_zeros(len(z))
    # a generator of its own: the estimate is the same every time, and the user's random state is left alone
    v = torch.randn(z.shape, generator=torch.Generator().manual_seed(0), device="cpu").to(z.device, out.dtype)
    logs = z.new_zeros(len(z), dtype=torch.float32)
    tail = iterations - iterations // 2
    for k in range(iterations):
        v = v / _norm(v).clamp_min(torch.finfo(v.dtype).tiny)
        (v,) = torch.autograd.grad(out, point, v, retain_graph=True, materialize_grads=True, allow_unused=True)
        if k >= iterations - tail:
            logs += _norm(v).float().log().flatten()
    return (logs / tail).exp()


def _norm(v: Tensor) -> Tensor:
    sizes: Tensor = torch.linalg.vector_norm(v.reshape(len(v), -1), dim=1)
    return sizes.view(-1, *[1] * (v.dim() - 1))
