"""When a sample is at its fixed point: its residual is small, and was getting smaller."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import NonFiniteError

SLACK = 100.0  # the rate may make the error this many times the tolerance
OVER = 3  # steps over which the rate is taken
ROUNDING = 16.0  # a residual of so many units of rounding needs no rate


class Convergence:
    """Residuals of all samples, on the host, and which of them are accepted.

    The residual of a sample is r = |f(z) - z| / |f(z)|. It is accepted once r <= tol and r <= 100 tol (1 - rate), with
    `rate` the factor by which |f(z) - z| shrank a step over the last steps. By the second condition a function without
    a fixed point, z + 1 say, whose relative residual shrinks only since z grows, is not taken for one that has it.

    Args:
        count: samples.
        tol: the largest relative residual of a sample that has converged.
        what: of whom, for messages.
    """

    def __init__(self, count: int, tol: float, what: str) -> None:
        self.tol, self.what, self.step = tol, what, 0
        self.converged = torch.zeros(count, dtype=torch.bool)
        self.steps = torch.zeros(count, dtype=torch.int64)
        self.trace: list[Tensor] = []  # (B,) float64 each
        self._moved: list[Tensor] = []

    def update(self, sizes: tuple[Tensor, Tensor], value: Tensor, z: Tensor, unit: float) -> None:
        """Take one step's |f(z) - z| and |f(z)|, both (B,). unit: rounding of f, relative.

        Raises:
            NonFiniteError: NaN or Inf in z or f(z), (B, D).
        """
        self.step += 1
        moved, size = torch.stack(sizes).to("cpu", torch.float64)
        if not bool((moved + size).isfinite().all()):
            self._refuse(moved + size, value, z)
        residual = torch.where(moved == 0, 0.0, moved / size).nan_to_num(torch.inf, torch.inf)  # inf / inf: overflow
        self.trace.append(residual)
        self._moved.append(moved)
        small = (residual <= self.tol) & ~self.converged
        if bool(small.any()):
            new = small & ((residual <= ROUNDING * unit) | (residual <= SLACK * self.tol * (1 - self._rate())))
            self.steps[new] = self.step
            self.converged |= new

    def _rate(self) -> Tensor:
        """(B,), by which |f(z) - z| shrank a step; 1 in the first."""
        back = min(OVER, self.step - 1)
        if back == 0:
            return torch.ones_like(self._moved[0])
        return (self._moved[-1] / self._moved[-1 - back]).nan_to_num(1.0, 1.0).pow(1 / back)

    def _refuse(self, sizes: Tensor, value: Tensor, z: Tensor) -> None:
        """Raise, unless it is only the norms that overflow."""
        for sample in (~sizes.isfinite()).nonzero()[:, 0].tolist():
            if not bool(value[sample].isfinite().all()):
                before = not bool(z[sample].isfinite().all())
                step = self.step - before
                raise NonFiniteError(
                    f"{self.what}: NaN or Inf in step {step}, sample {sample}; "
                    + ("the iteration diverged" if before else "f returned it")
                    + "; check the inputs and the dtype of f, and whether f is a contraction",
                    step=step, timestep=float("nan"), round=step, sample=sample,
                )  # fmt: skip

    def active(self, device: torch.device) -> Tensor | None:
        """(B,) bool, the samples that go on; None: all."""
        return (~self.converged).to(device) if bool(self.converged.any()) else None
