"""What a solver of an implicit layer is, and the function that it is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import ModelOutputError

Evaluate = Callable[[Tensor], Tensor]
"""f on flattened samples: (B, D) -> (B, D)."""


class Iteration(Protocol):
    """One solve as far as it is: `z` is where f is asked next. Rows of z are samples; none looks at another."""

    z: Tensor
    """(B, D)"""

    def record(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Take value = f(z), (B, D), and return (B,) the sizes |value - z| and |value|, L2."""
        ...

    def secant(self) -> tuple[Tensor, Tensor]:
        """(B,) |dz| and |dg|: by how much z and g = f(z) - z differ from the step before. Asked from step 2 on."""
        ...

    def advance(self, evaluate: Evaluate, active: Tensor | None) -> None:
        """Move `z` of the active samples, (B,) bool; None: of all."""
        ...

    def best(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of what is remembered, the (B, D) point of smallest residual, f there, and (B,) how many steps ago."""
        ...


class FixedPointSolver(Protocol):
    """Settings of a method; `start` begins a solve with them."""

    @property
    def name(self) -> str:
        """As it is shown in results and messages."""
        ...

    def start(self, z: Tensor) -> Iteration:
        """Begin at z, (B, D)."""
        ...


class FlatFunction:
    """A user's f, checked and counted, on flattened samples.

    Raises:
        ModelOutputError: f returned something else than a tensor of the shape and on the device of its input.
    """

    def __init__(self, f: Callable[[Tensor], Any], like: Tensor) -> None:
        self.f, self.shape, self.dtype, self.calls = f, like.shape, like.dtype, 0
        self.work_dtype = like.dtype if like.dtype.itemsize >= 4 else torch.float32
        self.own_dtype = like.dtype  # of what f returns: bfloat16 under autocast

    def __call__(self, z: Tensor) -> Tensor:
        self.calls += 1
        z = z.clone() if z.is_inference() else z  # which has no version that would tell of a change in place
        version = None if z.is_inference() else z._version
        value = self.f(z.to(self.dtype).view(self.shape))
        if version is not None and z._version != version:
            raise ModelOutputError("f: expected to leave its input as it is, it was changed in place; give f z.clone()")
        if not isinstance(value, Tensor) or value.shape != self.shape or value.device != z.device:
            got = f"{tuple(value.shape)} on {value.device}" if isinstance(value, Tensor) else type(value).__name__
            raise ModelOutputError(
                f"f: expected a tensor like its input, {tuple(self.shape)} on {z.device}, it returned {got}"
            )
        if not value.is_floating_point():
            raise ModelOutputError(f"f: expected a floating-point tensor, it returned {value.dtype}")
        self.own_dtype = value.dtype
        value = value.reshape(z.shape).to(self.work_dtype)
        return value if value.requires_grad else value.clone()  # f may write into the same tensor every time


def sizes(value: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) |value - z| and |value|, nothing of it recorded."""
    with torch.no_grad():
        return torch.linalg.vector_norm(value - z, dim=1), torch.linalg.vector_norm(value, dim=1)


def secant(new: tuple[Tensor, Tensor], old: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """(B,) |dz| and |dg| of two pairs z, f(z)."""
    with torch.no_grad():
        dz = (new[0] - old[0]).to(new[1].dtype)
        return torch.linalg.vector_norm(dz, dim=1), torch.linalg.vector_norm(new[1] - old[1] - dz, dim=1)


def keep_inactive(new: Tensor, old: Tensor, active: Tensor | None) -> Tensor:
    """`new` in the rows of active samples, `old` elsewhere."""
    return new if active is None else torch.where(active[:, None], new, old)
