"""The window's step: the solver loop's decisions, taken where the residuals are."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _dispatch
from .reference import advance_window as _reference
from .reference import limit

__all__ = ["advance_window", "limit"]

_SCHEMA = (
    "(Tensor sq_diff, Tensor sq_norm, Tensor(a!) lo, Tensor(b!) hi, Tensor(c!) was, Tensor(d!) verdict, "
    "Tensor(e!) rows, float freeze, float finish, int width, float reach=0.0, float left=0.0) -> ()"
)


def advance_window(
    sq_diff: Tensor,
    sq_norm: Tensor,
    lo: Tensor,
    hi: Tensor,
    was: Tensor,
    verdict: Tensor,
    rows: Tensor,
    freeze: float,
    finish: float,
    width: int,
    reach: float = 0.0,
    left: float = 0.0,
    *,
    backend: str = "auto",
) -> None:
    """Slide every sample's window past what has converged, and list what is active then; the host reads nothing.

    Row lo[b] was evaluated at a final state, so it is final now. Where its relative residual r[i] = sqrt(sq_diff[i] /
    sq_norm[i]) is above `freeze`, no other row is: they were evaluated at a state that is out of date. Else a row is
    final when r[i] is at most `freeze` and all rows before it are. All rows up to T are final when hi[b] = T and none
    is above `finish`, or none above `reach` and, at the rate at which the sample's largest residual fell since the
    round before, at most `left` is left to go (`reference.limit`). From the first row on whose residual is not finite,
    residuals count as Inf.

    Args:
        sq_diff, sq_norm: (T, B) float32 or float64, as the solver step leaves them.
        lo, hi: (B,) int32; moved to the next window, hi = min(T, lo + width).
        was: (2, B) int32, receives the old lo, and max(old hi, new lo): rows [was[0], lo) have become final, rows
            [was[1], hi) enter the window.
        verdict: (4, B) float32 or float64, receives lo, hi, the first row that is not finite (T: none), and the largest
            residual of the old window (0 where it was empty); its last row is that of the round before, 0 if unknown.
        rows: (N,) int64, receives the active rows i * B + b in ascending order (the first N of them), then T * B.
        width: rows of a window.
        reach, left: 0 for samples that end by `finish` alone.
        backend: as for `ddim_update`; there is no C++ form, "cpp" means the reference.

    Raises:
        ValueError: an argument has the wrong shape or dtype. BackendUnavailableError: as for `ddim_update`.
    """
    steps, batch = sq_diff.shape
    for name, tensor, shape, dtypes in (
        ("sq_norm", sq_norm, (steps, batch), (sq_diff.dtype,)),
        ("lo", lo, (batch,), (torch.int32,)),
        ("hi", hi, (batch,), (torch.int32,)),
        ("was", was, (2, batch), (torch.int32,)),
        ("verdict", verdict, (4, batch), (torch.float32, torch.float64)),
        ("rows", rows, (rows.numel(),), (torch.int64,)),
    ):
        _dispatch._expect(name, tensor, shape, dtypes, sq_diff.device)
    args = (sq_diff, sq_norm, lo, hi, was, verdict, rows, freeze, finish, width, reach, left)
    if backend == "auto" and _dispatch.dispatched(sq_diff):
        _op(*args)
    else:
        _run(backend, *args)


def _run(backend: str, sq_diff: Tensor, *args: Tensor | float) -> None:
    if _dispatch.resolve_light(backend, sq_diff) == "triton":
        from . import _triton

        with torch.cuda.device_of(sq_diff):
            _triton.launch(sq_diff, *args)  # type: ignore[arg-type]
    else:
        _reference(sq_diff, *args)  # type: ignore[arg-type]


def _auto(
    sq_diff: Tensor, sq_norm: Tensor, lo: Tensor, hi: Tensor, was: Tensor, verdict: Tensor, rows: Tensor,
    freeze: float, finish: float, width: int, reach: float = 0.0, left: float = 0.0,
) -> None:  # fmt: skip
    _run("auto", sq_diff, sq_norm, lo, hi, was, verdict, rows, freeze, finish, width, reach, left)


_op = torch.library.custom_op(
    "deqdiff_fast::advance_window", _reference, mutates_args=("lo", "hi", "was", "verdict", "rows"), schema=_SCHEMA
)
for _device in ("cpu", "cuda"):
    _op.register_kernel(_device, _auto)
_op.register_fake(lambda *args, **kwargs: None)
