"""The first half of the stopping rule: which rows have converged, by what they have left to go."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import WIDE, Arguments, expect
from .._register import register
from .reference import mark_converged as _reference

__all__ = ["mark_converged"]


def _validate(given: Arguments) -> None:
    sq_diff, strict = given["sq_diff"], given["strict"]
    shape, device, kinds = tuple(sq_diff.shape), sq_diff.device, (sq_diff.dtype,)
    expect("sq_diff", sq_diff, (*shape[:1], strict.numel()), WIDE, device)
    expect("sq_norm", given["sq_norm"], shape, kinds, device)
    expect("previous", given["previous"], shape, kinds, device)
    expect("strict", strict, shape[1:], kinds, device)


_op = register(
    __name__,
    "mark_converged(Tensor(a!) sq_diff, Tensor sq_norm, Tensor(b!) previous, Tensor strict, float freeze, "
    "float floor) -> ()",
    _reference,
    validate=_validate,
    cpp=lambda given: dict(zip("TB", given["sq_diff"].shape, strict=True)),
    cpp_serves=lambda given: given["sq_diff"].dtype == torch.float64,
    storage=("sq_diff",),
)


def mark_converged(
    sq_diff: Tensor, sq_norm: Tensor, previous: Tensor, strict: Tensor, freeze: float, floor: float, *,
    backend: str = "auto",
) -> None:  # fmt: skip
    """Bring sq_diff / sq_norm to at most freeze^2 where a row has converged, and above it where not, in place.

    A row that moved by r in this round and by p in the one before, relative to its size, contracts by rho = r / p and
    has r rho / (1 - rho) left to go (Aitken's extrapolation); rho is kept between 0.1 and 0.9, and is 0.5 where p is
    NaN. It has converged when that is at most freeze * strict, or r at most `floor`, the rounding. Where a row has not
    and r is above 2 freeze, and where r is not finite, sq_diff stays as it is. Constants: `stopping.py`.

    Args:
        sq_diff, sq_norm: (T, B) float32 or float64, squared step and size.
        previous: (T, B), r^2 of the round before, NaN where there is none; replaced by this round's.
        strict: (B,), how much tighter a sample's rows are held.
        freeze: what a converged row may have left to go, relative to its size.
        floor: the relative step that is rounding.
        backend: as for `ddim_update`; the C++ form is of float64, and is left to the reference where the numbers are
            others.

    Raises:
        ValueError: an argument has the wrong shape or dtype.
        BackendUnavailableError: a backend asked for by name cannot serve these tensors here.
    """
    _op(backend, sq_diff, sq_norm, previous, strict, freeze, floor)
