"""Operators of others: deepinv's physics, or any object with A, A_adjoint and A_dagger, as they are."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from .._devices import with_torch_defaults
from .base import Operator, Shape, compute_dtype
from .blur import Blur
from .colorize import Colorize

_MAPS = ("A", "A_adjoint", "A_dagger")
_VECTORS = ("U", "U_adjoint", "V", "V_adjoint")
_TRIALS = ((3, 16, 16), (2, 16, 16), (1, 16, 16))  # where nothing says which images are meant


@with_torch_defaults
def take(physics: Any, shape: Shape | None = None) -> Operator:
    """An operator of this library for an object of another one.

    deepinv's `LinearPhysics` and everything else with methods A(x), A_adjoint(y) and A_dagger(y) of tensors serve.
    Where A_dagger is iterative, its `tol` is the accuracy that `check` expects. Of objects with U, U_adjoint, V,
    V_adjoint and singular values `mask` >= 0, as deepinv's `DecomposablePhysics`, the decomposition is used too where
    V is orthonormal on all of the image. Those of deepinv where it is not, `BlurFFT` and `Decolorize`, become `Blur`
    and `Colorize`, the same operators.

    Args:
        physics: the object; an `Operator` is returned as it is. It is neither changed nor copied, and must be on the
            device of the images. One whose parameters (deepinv: buffers, samples first) are for B samples is for B.
        shape: (B, C, H, W) or (C, H, W) of the images, on which singular vectors are tried; None: the object's
            `img_size`, or else small images.

    Raises:
        TypeError: it lacks one of the methods.
    """
    if isinstance(physics, Operator):
        return physics
    missing = [name for name in _MAPS if not callable(getattr(physics, name, None))]
    if missing:
        raise TypeError(f"operator: expected A, A_adjoint and A_dagger; {type(physics).__name__} has no {missing[0]}")
    kind = type(physics)
    if kind.__module__.startswith("deepinv.") and kind.__name__ == "BlurFFT" and physics.filter is not None:
        return Blur(physics.filter)
    if kind.__module__.startswith("deepinv.") and kind.__name__ == "Decolorize":
        return Colorize(physics.srf.flatten().tolist())
    if shape is not None:
        trials: tuple[tuple[int, ...], ...] = (tuple(shape)[-3:],)
    else:
        own = getattr(physics, "img_size", None)
        trials = (tuple(own),) if isinstance(own, (tuple, list)) and len(own) == 3 else _TRIALS
    if any(_is_complete(physics, trial) for trial in trials):
        return _Decomposable(physics)
    return _Foreign(physics)


class _Foreign(Operator):
    """The three maps of another object."""

    def __init__(self, physics: Any) -> None:
        self.physics = physics
        self.accuracy = float(getattr(physics, "tol", 0.0) or 0.0)
        self.per_sample = any(len(part) > 1 for part in _parameters(physics).values())

    def A(self, x: Tensor) -> Tensor:
        return _like(self.physics.A(x), x, self.physics, "A")

    def A_adjoint(self, y: Tensor) -> Tensor:
        return _like(self.physics.A_adjoint(y), y, self.physics, "A_adjoint")

    def A_dagger(self, y: Tensor) -> Tensor:
        return _like(self.physics.A_dagger(y), y, self.physics, "A_dagger")

    def input_shape(self, y_shape: Shape) -> tuple[int, ...]:
        buffers = dict(getattr(self.physics, "_buffers", {})).values()
        like = next(
            (part for part in buffers if part is not None and part.is_floating_point()), torch.zeros((), device="cpu")
        )
        with torch.no_grad():
            return tuple(self.A_adjoint(like.new_zeros(tuple(y_shape))).shape)

    def for_samples(self, index: Tensor) -> Operator:
        if not self.per_sample:
            return self
        chosen = copy.copy(self)
        chosen.physics = copy.copy(self.physics)
        chosen.physics._buffers = {
            name: part.index_select(0, index.to(part.device)) if name in _parameters(self.physics) else part
            for name, part in self.physics._buffers.items()
        }
        return chosen


class _Decomposable(_Foreign):
    """Also the singular vectors of another object, V orthonormal on all of x."""

    decomposed = True

    def __init__(self, physics: Any) -> None:
        super().__init__(physics)
        self.accuracy = 0.0

    def A_dagger(self, y: Tensor) -> Tensor:
        return Operator.A_dagger(self, y)  # theirs has a cutoff of its own

    def V_adjoint(self, x: Tensor) -> Tensor:
        return _like(self.physics.V_adjoint(x), x, self.physics, "V_adjoint")

    def V(self, c: Tensor) -> Tensor:
        return _like(self.physics.V(c), c, self.physics, "V")

    def U_adjoint(self, y: Tensor) -> Tensor:
        found = _like(self.physics.U_adjoint(y), y, self.physics, "U_adjoint")
        return found * (self._positive(y) > 0)

    def U(self, c: Tensor) -> Tensor:
        return _like(self.physics.U(c * (self._positive(c) > 0)), c, self.physics, "U")

    def singular_values(self, x_shape: Shape, device: torch.device | str, dtype: torch.dtype) -> Tensor:
        values = torch.as_tensor(self.physics.mask).to(dtype).to(device)
        largest = values.flatten(1).amax(1) if values.dim() > 1 else values.amax()
        largest = largest.reshape(-1, *[1] * (values.dim() - 1)) if values.dim() > 1 else largest
        return torch.where(values > self.cutoff(dtype) * largest, values, 0)

    def _positive(self, like: Tensor) -> Tensor:
        return self.singular_values((), like.device, compute_dtype(like.dtype))


def _parameters(physics: Any) -> dict[str, Tensor]:
    """Buffers of a torch module that have samples first, as those of deepinv with four or more dimensions."""
    buffers = dict(getattr(physics, "_buffers", {}))
    return {name: part for name, part in buffers.items() if isinstance(part, Tensor) and part.dim() >= 4}


def _is_complete(physics: Any, size: tuple[int, ...]) -> bool:
    """Whether it has singular values >= 0, and V real and orthonormal on images (C, H, W)."""
    if not all(callable(getattr(physics, name, None)) for name in _VECTORS):
        return False
    values = torch.as_tensor(getattr(physics, "mask", None) if getattr(physics, "mask", None) is not None else -1.0)
    if values.is_complex() or not bool((values >= 0).all()):
        return False
    rows = len(values) if values.dim() >= 4 else 1
    x = torch.randn((rows, *size), generator=torch.Generator().manual_seed(0)).to(values.device)
    try:
        with torch.no_grad():
            c = physics.V_adjoint(x)
            back, shaped = physics.V(c), (values * c).shape == c.shape
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
        return False  # such images are not meant
    if c.is_complex() or not shaped or c.numel() != x.numel() or back.shape != x.shape:
        return False
    return bool((back - x).norm() <= 1e-3 * x.norm()) and bool((c.norm() - x.norm()).abs() <= 1e-3 * x.norm())


def _like(found: Any, given: Tensor, physics: Any, what: str) -> Tensor:
    """A result in the dtype of what was given."""
    if not isinstance(found, Tensor):
        raise ValueError(f"{type(physics).__name__}.{what}: expected a tensor, got {type(found).__name__}")
    return found.to(given.dtype)


__all__ = ["take"]
