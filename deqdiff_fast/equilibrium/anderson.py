"""Anderson acceleration, one set of mixing weights a sample."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .._devices import TORCH_DEFAULTS
from .base import Evaluate, keep_inactive, secant


@dataclass(frozen=True)
class AndersonSolver:
    """z <- sum_j alpha_j (f(z_j) - (1 - w) g_j) over the last M steps, with g_j = f(z_j) - z_j.

    alpha minimises |sum_j alpha_j g_j|^2 + ridge sum_j (alpha_j |g_j|)^2 with sum alpha = 1 (Walker and Ni 2011, SIAM
    J. Numer. Anal. 49(4), eq. 2.2), for each sample alone.

    Args:
        history: M, steps that are mixed, >= 2.
        damping: w in (0, 1], the weight of f against the old points; 1 is undamped.
        ridge: > 0, relative to the size of each residual.

    Raises:
        ValueError: a setting is out of its range.
    """

    history: int = 5
    damping: float = 1.0
    ridge: float = 1e-8

    def __post_init__(self) -> None:
        if isinstance(self.history, bool) or not isinstance(self.history, int) or self.history < 2:
            raise ValueError(f"history: expected an int >= 2, got {self.history!r}")
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping: expected a number in (0, 1], got {self.damping!r}")
        if not 0 < self.ridge < 1:
            raise ValueError(f"ridge: expected a number in (0, 1), got {self.ridge!r}")

    @property
    def name(self) -> str:
        return f"anderson(history={self.history})"

    def start(self, z: Tensor) -> AndersonIteration:
        """See `FixedPointSolver.start`."""
        return AndersonIteration(self, z)


class AndersonIteration:
    """See `Iteration`. Columns of the history are rings, (B, M, D), so that all products are batched ones."""

    def __init__(self, settings: AndersonSolver, z: Tensor) -> None:
        self.settings, self.z = settings, z
        self.count = 0  # of the steps recorded
        self.column = 0  # of the newest
        self.gram = z.new_empty(0)  # (B, n, n), inner products of the residuals
        shape = (len(z), settings.history, z.shape[1])
        self._values, self._residuals = z.new_empty(shape), z.new_empty(shape)

    def record(self, value: Tensor) -> tuple[Tensor, Tensor]:
        self.column = self.count % self.settings.history
        self.count += 1
        self.store(value)
        residuals = self.history()[1]
        # one product of matrices: faster than the new row alone, which is one of a matrix and a vector
        with TORCH_DEFAULTS.applied():  # autocast is for f: products in bfloat16 would round z
            self.gram = torch.bmm(residuals, residuals.mT)
        with torch.no_grad():
            return self.gram[:, self.column, self.column].sqrt(), torch.linalg.vector_norm(value, dim=1)

    def store(self, value: Tensor) -> None:
        """Keep f(z) and its residual as the newest column."""
        self._values[:, self.column] = value
        torch.sub(value, self.z, out=self._residuals[:, self.column])

    def history(self) -> tuple[Tensor, Tensor]:
        """f(z_j) and g_j, both (B, n, D)."""
        n = min(self.count, self.settings.history)
        return self._values[:, :n], self._residuals[:, :n]

    def secant(self) -> tuple[Tensor, Tensor]:
        values, residuals = self.history()
        now, before = self.column, (self.column - 1) % values.shape[1]
        pair = [(values[:, k] - residuals[:, k], values[:, k]) for k in (now, before)]
        return secant(*pair)

    def advance(self, evaluate: Evaluate, active: Tensor | None) -> None:
        values, residuals = self.history()
        alpha = mixing_weights(self.gram, self.column, self.settings.ridge)[:, None].to(values.dtype)
        with TORCH_DEFAULTS.applied():
            mixed = torch.bmm(alpha, values)[:, 0]
            if self.settings.damping < 1:
                mixed = mixed - (1 - self.settings.damping) * torch.bmm(alpha, residuals)[:, 0]
        self.z = keep_inactive(mixed, self.z, active)

    def best(self) -> tuple[Tensor, Tensor, Tensor]:
        values, residuals = self.history()
        sizes = self.gram.diagonal(dim1=1, dim2=2)
        at = torch.where(sizes.isfinite(), sizes, torch.inf).argmin(1)
        rows = torch.arange(len(at), device=at.device)
        value = values[rows, at]
        return value - residuals[rows, at], value, ((self.column - at) % values.shape[1]).cpu()


def mixing_weights(gram: Tensor, newest: int, ridge: float) -> Tensor:
    """(B, n) alpha from inner products (B, n, n) of the residuals; the newest column alone where that has no answer."""
    gram = gram.double() if gram.device.type != "mps" else gram
    # squares of zero or denormal numbers would make NaN of the system, which is slow besides
    size = gram.diagonal(dim1=1, dim2=2).clamp_min(torch.finfo(gram.dtype).tiny ** 0.5)
    last = size[:, newest, None]
    scale = (last / size).sqrt()
    eye = torch.eye(size.shape[1], dtype=gram.dtype, device=gram.device)
    system = gram * (scale[:, :, None] * scale[:, None] / last[..., None]) + ridge * eye
    alpha = torch.linalg.solve_ex(system, scale[..., None]).result[..., 0] * scale
    alpha = alpha / alpha.sum(1, keepdim=True)
    usable = alpha.isfinite().all(1, keepdim=True) & (gram[:, newest, newest, None] > 0)
    return torch.where(usable, alpha, eye[newest])
