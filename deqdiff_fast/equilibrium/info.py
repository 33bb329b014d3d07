"""What is known of a solve of an implicit layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .spectral_radius import spectral_radius


@dataclass
class SolveTrace:
    """One fixed-point solve. All tensors are on the CPU."""

    converged: Tensor
    """(B,) bool: the sample's residual is at most `tol`, and was shrinking."""
    steps: Tensor
    """(B,) int64: the step in which it was accepted, from 1; the last one where it was not."""
    residual: Tensor
    """(B,) float64: |f(z) - z| / |f(z)|, L2, at the point that was accepted, or the best one."""
    residual_trace: Tensor
    """(steps, B) float64: the same in every step. That of a sample stays once it is accepted."""


@dataclass
class EquilibriumInfo(SolveTrace):
    """What `equilibrium` returns beside z."""

    evaluations: int
    """Calls of f, all samples in each; without those of a backward pass."""
    solver: str
    gradient: str
    adjoint: SolveTrace | None = None
    """The adjoint's solve, with gradient="implicit", once a backward pass has been made."""
    _f: Callable[[Tensor], Any] | None = field(default=None, repr=False)
    _z: Tensor | None = field(default=None, repr=False)

    def spectral_radius(self, iterations: int = 50) -> Tensor:
        """Estimate the spectral radius of df/dz at the solution, by power iteration with vector-Jacobian products.

        Below 1 the plain iteration converges, and about log(tol) / log(radius) steps of it are needed.

        Args:
            iterations: vector-Jacobian products; the growth over the second half of them counts.

        Returns:
            (B,), one for each sample, on the device of z.

        Raises:
            ValueError: iterations < 2.
        """
        assert self._f is not None
        assert self._z is not None
        return spectral_radius(self._f, self._z, iterations)
