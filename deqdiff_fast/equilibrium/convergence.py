"""When a sample is at its fixed point: its residual is small, and so is the error that a secant makes of it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import NonFiniteError
from .base import Iteration

SLACK, MOST = 10.0, 0.1  # what the estimated error may be: so many tolerances, but no more than that, or one tolerance
ROUNDING = 16.0  # a residual of so many units of rounding needs no estimate


class Convergence:
    """Residuals of all samples, on the host, and which of them are accepted.

    The residual of a sample is r = |g| / |f(z)| with g = f(z) - z. It is accepted once r <= tol and

        r |dz| / |dg| <= 10 tol

    where dz and dg are the last step and what it changed of g: a secant of (1 - df/dz)^-1, so the left side estimates
    the relative error of z. Where the plain iteration shrinks |g| by `rate` a step it is r / (1 - rate). So a function
    without a fixed point, z + 1 / z say, whose residual falls below every tolerance since z grows, is not taken for one
    that has it. For tolerances above 1e-2 the factor is less than 10.

    Args:
        count: samples.
        tol: the largest relative residual of a sample that has converged.
        what: of whom, for messages.
    """

    # all tensors have a device of their own: the user may have set another default

    def __init__(self, count: int, tol: float, what: str) -> None:
        self.tol, self.what, self.step = tol, what, 0
        self.far = max(tol, min(SLACK * tol, MOST))
        self.converged = torch.zeros(count, dtype=torch.bool, device="cpu")
        self.steps = torch.zeros(count, dtype=torch.int64, device="cpu")
        self.trace: list[Tensor] = []  # (B,) float64 each
        self.done, self.begun = False, False  # all samples are accepted; some are

    def update(self, sizes: tuple[Tensor, Tensor], iteration: Iteration, value: Tensor, unit: float) -> None:
        """Take one step's |g| and |f(z)|, both (B,). unit: rounding of f, relative.

        Raises:
            NonFiniteError: NaN or Inf in z or value = f(z), (B, D).
        """
        self.step += 1
        change, size = torch.stack(sizes).cpu().double()
        residual = change / size
        if not bool((residual + size).isfinite().all()):
            self._refuse(change + size, value, iteration.z)
            residual = _wide_residual(value, iteration.z)
        self.trace.append(residual)
        small = residual <= self.tol
        if bool(small.any()):
            self._accept(small & ~self.converged, residual, iteration, unit)

    def _accept(self, small: Tensor, residual: Tensor, iteration: Iteration, unit: float) -> None:
        """Of the samples whose residual is small, those that are not far away."""
        new = small & (residual <= ROUNDING * unit)
        if self.step > 1 and bool(small.any()):
            moved, turned = torch.stack(iteration.secant()).cpu().double()
            new |= small & (residual * (moved / turned).nan_to_num(torch.inf, torch.inf) <= self.far)
        self.steps[new] = self.step
        self.converged |= new
        self.done, self.begun = bool(self.converged.all()), bool(self.converged.any())

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
        return (~self.converged).to(device) if self.begun else None


def _wide_residual(value: Tensor, z: Tensor) -> Tensor:
    """(B,) on the host, in float64: for numbers whose squares overflow or vanish, and for 0 / 0, which is none."""
    value, z = value.detach().cpu().double(), z.detach().cpu().double()
    change, size = (value - z).norm(dim=1), value.norm(dim=1)
    return torch.where(change == 0, 0.0, change / size).nan_to_num(torch.inf, torch.inf)
