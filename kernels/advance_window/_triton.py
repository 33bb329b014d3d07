"""Triton kernels of the window's move: the loop's decisions taken on the device, so that the host need not wait.

Two launches: one program per sample moves its window, then one program lists the rows that are active. Bytes: 2 T B
residual sums in, N indices out. int64 indices.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .._launches import launcher
from ..stopping import TINY_OF


@triton.jit
def residuals(sq_diff, sq_norm, i, b, B, inside, TINY: tl.constexpr):
    """Relative residuals of rows i (SPAN,) of sample b; zero outside the window, NaN stays NaN."""
    at = i.to(tl.int64) * B + b
    diff = tl.load(sq_diff + at, mask=inside, other=0.0)
    norm = tl.load(sq_norm + at, mask=inside, other=1.0)
    return tl.sqrt(diff / tl.where(norm < TINY, TINY, norm))


@triton.jit(do_not_specialize=["T", "width"])
def window_bounds_kernel(
    sq_diff, sq_norm, lo, hi, previous_bounds, decision, T, B, width, freeze: tl.float64, finish: tl.float64,
    TINY: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """One sample. previous_bounds (2, B), decision (4, B): see reference.py."""
    b = tl.program_id(0)
    first, last = tl.maximum(tl.load(lo + b), 0), tl.minimum(tl.load(hi + b), T)
    span = tl.arange(0, SPAN)
    least, limit = tl.full((), freeze, sq_diff.dtype.element_ty), tl.full((), finish, sq_diff.dtype.element_ty)
    broken, front, above, worst = T, last, 0, tl.zeros((), sq_diff.dtype.element_ty)
    for start in tl.range(first, last, SPAN):
        i = start + span
        residual = residuals(sq_diff, sq_norm, i, b, B, i < last, TINY)
        bad = (i < last) & ((residual != residual) | (residual == float("inf")))
        stuck = (i < last) & ((residual > least) | (residual != residual))
        coarse = (i < last) & ((residual > limit) | (residual != residual))
        broken = tl.minimum(broken, tl.min(tl.where(bad, i, T)))
        front = tl.minimum(front, tl.min(tl.where(stuck, i, last)))
        worst = tl.maximum(worst, tl.max(tl.where(bad, float("inf"), residual)))
        above = tl.maximum(above, tl.max(tl.where(coarse, 1, 0)))
    front = tl.maximum(front, tl.minimum(first + 1, last))
    front = tl.where((above == 0) & (last == T), T, front)
    front = tl.where(first < T, front, first)
    until = tl.minimum(front + width, T)
    tl.store(previous_bounds + b, first)
    tl.store(previous_bounds + B + b, tl.maximum(last, front))
    tl.store(lo + b, front)
    tl.store(hi + b, until)
    tl.store(decision + b, front.to(decision.dtype.element_ty))
    tl.store(decision + B + b, until.to(decision.dtype.element_ty))
    tl.store(decision + 2 * B + b, broken.to(decision.dtype.element_ty))
    tl.store(decision + 3 * B + b, worst.to(decision.dtype.element_ty))


@triton.jit(do_not_specialize=["T", "N"])
def active_rows_kernel(lo, hi, rows, T, B, N, SPAN: tl.constexpr):
    """The active rows i * B + b in order, then T * B up to N."""
    span = tl.arange(0, SPAN)
    count = 0
    for start in tl.range(0, T * B, SPAN):
        row = start + span
        i, b = row // B, row % B
        inside = row < T * B
        active = inside & (i >= tl.load(lo + b, mask=inside, other=0)) & (i < tl.load(hi + b, mask=inside, other=0))
        ones = tl.where(active, 1, 0)
        place = count + tl.cumsum(ones, axis=0) - 1
        tl.store(rows + place, row.to(tl.int64), mask=active & (place < N))
        count += tl.sum(ones)
    for start in tl.range(count, N, SPAN):
        place = start + span
        tl.store(rows + place, tl.zeros((SPAN,), tl.int64) + T * B, mask=place < N)


def launch(
    sq_diff: Tensor, sq_norm: Tensor, lo: Tensor, hi: Tensor, previous_bounds: Tensor, decision: Tensor, rows: Tensor,
    freeze: float, finish: float, width: int,
) -> None:  # fmt: skip
    """The op on contiguous tensors: two launches."""
    steps, batch = sq_diff.shape
    launcher(window_bounds_kernel, (batch,))(
        sq_diff, sq_norm, lo, hi, previous_bounds, decision, steps, batch, width, freeze, finish,
        TINY=TINY_OF[sq_norm.dtype], SPAN=128, num_warps=1,
    )  # fmt: skip
    launcher(active_rows_kernel, (1,))(lo, hi, rows, steps, batch, len(rows), SPAN=1024, num_warps=4)
