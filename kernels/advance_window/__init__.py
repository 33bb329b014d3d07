"""The second half of the stopping rule: the window moves past final rows, on the device, where the residuals are."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import INDEX, WIDE, Arguments, expect
from .._register import register
from .reference import advance_window as _reference

__all__ = ["advance_window"]


def _validate(given: Arguments) -> None:
    sq_diff = given["sq_diff"]
    if sq_diff.dim() != 2:
        raise ValueError(f"sq_diff: expected shape (T, B), got {tuple(sq_diff.shape)}")
    (steps, batch), device = sq_diff.shape, sq_diff.device
    expect("sq_diff", sq_diff, (steps, batch), WIDE, device)
    expect("sq_norm", given["sq_norm"], (steps, batch), (sq_diff.dtype,), device)
    for name, shape in (("lo", (batch,)), ("hi", (batch,)), ("previous_bounds", (2, batch))):
        expect(name, given[name], shape, INDEX, device)
    expect("decision", given["decision"], (4, batch), WIDE, device)
    expect("rows", given["rows"], (given["rows"].numel(),), (torch.int64,), device)
    if not 1 <= given["width"] < 2**31:
        raise ValueError(f"width: expected a number of rows >= 1, got {given['width']}")


_op = register(
    __name__,
    "advance_window(Tensor sq_diff, Tensor sq_norm, Tensor(a!) lo, Tensor(b!) hi, Tensor(c!) previous_bounds, "
    "Tensor(d!) decision, Tensor(e!) rows, float freeze, float finish, int width) -> ()",
    _reference,
    validate=_validate,
    storage=("sq_diff",),
)


def advance_window(
    sq_diff: Tensor, sq_norm: Tensor, lo: Tensor, hi: Tensor, previous_bounds: Tensor, decision: Tensor, rows: Tensor,
    freeze: float, finish: float, width: int, *, backend: str = "auto",
) -> None:  # fmt: skip
    """Slide every sample's window past its final rows, and list what is active then; the host reads nothing.

    Row lo[b] was evaluated at a final state, so it is final now. Where its relative residual r[i] = sqrt(sq_diff[i] /
    sq_norm[i]) is above `freeze`, no other row is: they were evaluated at a state that is out of date. Else a row is
    final when r[i] is at most `freeze` and all rows before it are. All rows up to T are final when hi[b] = T and none
    is above `finish`. From the first row on whose residual is not finite, residuals count as Inf.

    Args:
        sq_diff, sq_norm: (T, B) float32 or float64, as `mark_converged` leaves them.
        lo, hi: (B,) int32; moved to the next window, hi = min(T, lo + width).
        previous_bounds: (2, B) int32, receives the old lo, and max(old hi, new lo): rows [previous_bounds[0], lo) have
            become final, rows [previous_bounds[1], hi) enter the window.
        decision: (4, B) float32 or float64, receives lo, hi, the first row that is not finite (T: none), and the
            largest residual of the old window (0 where it was empty).
        rows: (N,) int64, receives the active rows i * B + b in ascending order (the first N of them), then T * B.
        freeze: largest relative residual of a final row.
        finish: largest relative residual at which a sample may end.
        width: rows of a window.
        backend: as for `ddim_update`; there is no C++ form, "cpp" means the reference.

    Raises:
        ValueError: an argument has the wrong shape or dtype.
        BackendUnavailableError: a backend asked for by name cannot serve these tensors here.
    """
    _op(backend, sq_diff, sq_norm, lo, hi, previous_bounds, decision, rows, freeze, finish, width)
