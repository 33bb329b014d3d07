"""Triton kernel of the marking of converged rows: one launch, elementwise over (T, B).

The formula is that of reference.py (Aitken). Bytes: 3 numbers in and 2 out for every row of every sample.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .._launches import launcher
from ..stopping import FIRST_RATE, MAX_RATE, MIN_RATE, TINY_OF


@triton.jit(do_not_specialize=["N", "B"])
def mark_converged_kernel(
    sq_diff, sq_norm, previous, strict, N, B, freeze: tl.float64, floor: tl.float64, MIN_RATE: tl.constexpr,
    MAX_RATE: tl.constexpr, FIRST_RATE: tl.constexpr, TINY: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """SPAN of the N = T B rows."""
    WIDE: tl.constexpr = sq_diff.dtype.element_ty
    row = tl.program_id(0) * SPAN + tl.arange(0, SPAN)
    mask = row < N
    norm = tl.load(sq_norm + row, mask=mask, other=1.0)
    norm = tl.where(norm < TINY, TINY, norm)  # comparisons, not tl.maximum: NaN stays NaN
    step = tl.load(sq_diff + row, mask=mask, other=0.0) / norm
    ratio = step / tl.load(previous + row, mask=mask, other=1.0)
    ratio = tl.where(ratio != ratio, FIRST_RATE * FIRST_RATE, ratio)
    ratio = tl.where(ratio < MIN_RATE * MIN_RATE, MIN_RATE * MIN_RATE, ratio)
    ratio = tl.where(ratio > MAX_RATE * MAX_RATE, MAX_RATE * MAX_RATE, ratio)
    rho = tl.sqrt(ratio)
    share = rho / (1.0 - rho)
    least, rounding = tl.full((), freeze, WIDE), tl.full((), floor, WIDE)
    allowed = least * tl.load(strict + row % B, mask=mask, other=1.0)
    converged = (step * share * share <= allowed * allowed) | (step <= rounding * rounding)
    low, high = least * least, 4.0 * least * least
    kept = tl.where(step > low, low, step)
    raised = tl.where(step < high, high, step)
    tl.store(previous + row, step, mask=mask)
    tl.store(sq_diff + row, tl.where(converged, kept, raised) * norm, mask=mask)


def launch(sq_diff: Tensor, sq_norm: Tensor, previous: Tensor, strict: Tensor, freeze: float, floor: float) -> None:
    """The op on contiguous tensors: one launch."""
    count = sq_diff.numel()
    launcher(mark_converged_kernel, (triton.cdiv(count, 128),))(
        sq_diff, sq_norm, previous, strict, count, strict.numel(), freeze, floor, MIN_RATE=MIN_RATE, MAX_RATE=MAX_RATE,
        FIRST_RATE=FIRST_RATE, TINY=TINY_OF[sq_norm.dtype], SPAN=128, num_warps=1,
    )  # fmt: skip
