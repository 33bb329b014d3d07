"""Copies of rows between bounds that only the device knows."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _dispatch
from .reference import copy_rows as _reference

__all__ = ["copy_rows"]


def copy_rows(target: Tensor, source: Tensor, first: Tensor, last: Tensor, *, backend: str = "auto") -> None:
    """target[i, b] <- source[i % S, b] for first[b] <= i < last[b], in place; the host reads nothing.

    Args:
        target: (R, B, D). source: (S, B, D), a ring of rows, of any floating-point dtype.
        first, last: (B,) int32; rows beyond the target are left out.
        backend: as for `ddim_update`; there is no C++ form, "cpp" means the reference.

    Raises:
        ValueError: an argument has the wrong shape or dtype. BackendUnavailableError: as for `ddim_update`.
    """
    if target.dim() != 3 or source.dim() != 3 or source.shape[1:] != target.shape[1:]:
        raise ValueError(
            f"target, source: expected shapes (R, B, D) and (S, B, D), got {tuple(target.shape)}, {tuple(source.shape)}"
        )
    for name, bound in (("first", first), ("last", last)):
        _dispatch._expect(name, bound, (target.shape[1],), (torch.int32,), target.device)
    if backend == "auto" and _dispatch.dispatched(target):
        _op(target, source, first, last)
    else:
        _run(backend, target, source, first, last)


def _run(backend: str, target: Tensor, source: Tensor, first: Tensor, last: Tensor) -> None:
    dense = target.is_contiguous() and source.is_contiguous()
    if (name := _dispatch.resolve_light(backend, target)) == "triton" and (dense or backend != "auto"):
        from . import _triton

        if not dense:
            raise ValueError("target, source: the triton backend expects contiguous tensors")
        with torch.cuda.device_of(target):
            _triton.launch(target, source, first, last)
    else:
        assert name in ("reference", "triton")
        _reference(target, source, first, last)


def _auto(target: Tensor, source: Tensor, first: Tensor, last: Tensor) -> None:
    _run("auto", target, source, first, last)


_op = torch.library.custom_op(
    "deqdiff_fast::copy_rows",
    _reference,
    mutates_args=("target",),
    schema="(Tensor(a!) target, Tensor source, Tensor first, Tensor last) -> ()",
)
for _device in ("cpu", "cuda"):
    _op.register_kernel(_device, _auto)
_op.register_fake(lambda *args, **kwargs: None)
