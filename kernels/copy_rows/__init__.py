"""Copies of rows between bounds that only the device knows."""

from __future__ import annotations

from torch import Tensor

from .._checks import INDEX, STORAGE, Arguments, expect
from .._register import register
from .reference import copy_rows as _reference

__all__ = ["copy_rows"]


def _validate(given: Arguments) -> None:
    target, source = given["target"], given["source"]
    if target.dim() != 3 or source.shape[1:] != target.shape[1:] or not len(source):
        shapes = f"{tuple(target.shape)}, {tuple(source.shape)}"
        raise ValueError(f"target, source: expected shapes (R, B, D) and (S, B, D) with S >= 1, got {shapes}")
    expect("target", target, target.shape, STORAGE, target.device)
    expect("source", source, source.shape, STORAGE, target.device)
    expect("first", given["first"], target.shape[1:2], INDEX, target.device)
    expect("last", given["last"], target.shape[1:2], INDEX, target.device)


_op = register(
    __name__,
    "copy_rows(Tensor(a!) target, Tensor source, Tensor first, Tensor last) -> ()",
    _reference,
    validate=_validate,
    storage=("target",),
)


def copy_rows(target: Tensor, source: Tensor, first: Tensor, last: Tensor, *, backend: str = "auto") -> None:
    """target[i, b] <- source[i % S, b] for first[b] <= i < last[b], in place; the host reads nothing.

    Args:
        target: (R, B, D).
        source: (S, B, D), a ring of rows, of any floating-point dtype.
        first, last: (B,) int32; rows beyond the target are left out.
        backend: as for `ddim_update`; there is no C++ form, "cpp" means the reference.

    Raises:
        ValueError: an argument has the wrong shape or dtype.
        BackendUnavailableError: a backend asked for by name cannot serve these tensors here.
    """
    _op(backend, target, source, first, last)
