"""Conjugate gradients for a batch of symmetric positive definite systems, each row on its own.

Hestenes and Stiefel 1952, doi 10.6028/jres.049.044.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def conjugate_gradients(
    apply: Callable[[Tensor], Tensor], b: Tensor, *, start: Tensor | None = None, iterations: int = 100,
    tol: float = 1e-6,
) -> Tensor:  # fmt: skip
    """v with apply(v) = b, (n, ...), to a residual of tol relative to b, or as far as `iterations` lead.

    The same number of steps for all rows, those that are done standing still, so that none depends on the others.
    The host waits for no number.
    """

    def product(x: Tensor, y: Tensor) -> Tensor:
        return (x * y).flatten(1).sum(1).view(-1, *(1,) * (b.dim() - 1))

    v = torch.zeros_like(b) if start is None else start
    r = b - apply(v) if start is not None else b
    p, size = r, product(r, r)
    enough = tol**2 * product(b, b)
    for _ in range(iterations):
        going, image = size > enough, apply(p)
        curvature = product(p, image)
        step = torch.where(going & (curvature > 0), size / torch.where(curvature > 0, curvature, 1), 0)
        v, r = v + step * p, r - step * image
        new = product(r, r)
        p = r + torch.where(going, new / torch.where(size > 0, size, 1), 0) * p
        size = torch.where(going, new, size)
    return v
