"""What the Triton kernels of a chain are made of: rows of tensors and rings, and one step of the affine scan.

Tensors are time-major, (rows, B, D); `lanes` are the elements of D that a program works on, `mask` those that exist.
Offsets are int64; arithmetic is in WIDE: float32, or float64 if the states are.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def window(lo, hi, b, T):
    """The active rows of sample b, clamped into the chain whatever the device memory holds."""
    first = tl.maximum(tl.load(lo + b), 0)
    return first, tl.minimum(tl.load(hi + b), T)


@triton.jit
def chunk_of(first, last, chunk, chunks):
    """Rows [begin, end) of one of `chunks` nearly equal parts of [first, last)."""
    size = tl.cdiv(tl.maximum(last - first, 0), chunks)
    begin = first + chunk * size
    return begin, tl.minimum(begin + size, last)


@triton.jit
def known_row(x, i, b, B, D, lanes, mask, WIDE: tl.constexpr):
    """Row i of a time-major tensor, zero where i < 0."""
    row = x + (tl.cast(tl.maximum(i, 0), tl.int64) * B + b) * D
    return tl.where(i >= 0, tl.load(row + lanes, mask=mask, other=0.0).to(WIDE), 0.0)


@triton.jit
def earlier_rows(x, i, otherwise, b, B, D, lanes, mask, L: tl.constexpr, WIDE: tl.constexpr):
    """Rows i - 1, i - 2 and i - 3, those that a chain of L lags has use for."""
    x1, x2, x3 = otherwise, otherwise, otherwise
    if L > 1:
        x1 = known_row(x, i - 1, b, B, D, lanes, mask, WIDE)
    if L > 2:
        x2 = known_row(x, i - 2, b, B, D, lanes, mask, WIDE)
    if L > 3:
        x3 = known_row(x, i - 3, b, B, D, lanes, mask, WIDE)
    return x1, x2, x3


@triton.jit
def older_columns(ring, i, b, B, D, W, column, lanes, bound, RING: tl.constexpr, P: tl.constexpr, WIDE: tl.constexpr):
    """Row i of the ring columns written 1, 2, ... P rounds ago, (P, lanes); zero where lanes >= bound (P,)."""
    columns = (column + 2 * RING - 1 - tl.arange(0, P)) % RING
    at = (((columns * W + i % W).to(tl.int64) * B + b) * D)[:, None] + lanes[None, :]
    return tl.load(ring + at, mask=(lanes < D)[None, :] & (bound > 0)[:, None], other=0.0).to(WIDE)


@triton.jit
def own_column(ring, i, b, B, D, W, column):
    """Row i of this round's ring column."""
    return ring + (tl.cast(column * W + i % W, tl.int64) * B + b) * D


@triton.jit
def slope_row(slope, i, D, lanes, mask, SPECTRAL: tl.constexpr, WIDE: tl.constexpr):
    """The slope of row i, for every element."""
    if SPECTRAL:
        return tl.load(slope + tl.cast(i, tl.int64) * D + lanes, mask=mask, other=0.0).to(WIDE)
    return tl.zeros(lanes.shape, WIDE) + tl.load(slope + i).to(WIDE)


@triton.jit
def drift_row(drift, i, b, B, D, lanes, mask, DRIFT: tl.constexpr, WIDE: tl.constexpr):
    """The drift of row i, zero where there is none."""
    if DRIFT:
        return known_row(drift, i, b, B, D, lanes, mask, WIDE)
    return tl.zeros(lanes.shape, WIDE)


@triton.jit
def larger(step, residual):
    """Their maximum, NaN if either is."""
    return tl.where((step > residual) | (step != step), step, residual)


@triton.jit
def combined(
    i, x0, x1, x2, x3, e0, e1, e2, e3, state_coef, model_coef, L: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """The state that follows row i, without drift; x_l, e_l are the states and predictions of l rows before."""
    a, c = state_coef + i * L, model_coef + i * L
    new = tl.fma(tl.load(a).to(WIDE), x0, tl.load(c).to(WIDE) * e0)  # spelled out: rounds alike wherever it is inlined
    if L > 1:
        new = tl.fma(tl.load(c + 1).to(WIDE), e1, tl.fma(tl.load(a + 1).to(WIDE), x1, new))
    if L > 2:
        new = tl.fma(tl.load(c + 2).to(WIDE), e2, tl.fma(tl.load(a + 2).to(WIDE), x2, new))
    if L > 3:
        new = tl.fma(tl.load(c + 3).to(WIDE), e3, tl.fma(tl.load(a + 3).to(WIDE), x3, new))
    return new


@triton.jit
def scan_row(
    i, b, B, D, lanes, mask, x0, x1, x2, x3, e1, e2, e3, predictions, drift, state_coef, model_coef,
    L: tl.constexpr, DRIFT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The state that follows row i, and row i's prediction; x_l, e_l are those of l rows before."""
    at = (tl.cast(i, tl.int64) * B + b) * D
    a, c = state_coef + i * L, model_coef + i * L
    e0 = tl.load(predictions + at + lanes, mask=mask, other=0.0).to(WIDE)
    new = tl.fma(tl.load(a).to(WIDE), x0, tl.load(c).to(WIDE) * e0)  # not `combined`, with which registers spill
    if L > 1:
        new = tl.fma(tl.load(c + 1).to(WIDE), e1, tl.fma(tl.load(a + 1).to(WIDE), x1, new))
    if L > 2:
        new = tl.fma(tl.load(c + 2).to(WIDE), e2, tl.fma(tl.load(a + 2).to(WIDE), x2, new))
    if L > 3:
        new = tl.fma(tl.load(c + 3).to(WIDE), e3, tl.fma(tl.load(a + 3).to(WIDE), x3, new))
    if DRIFT:
        new += tl.load(drift + at + lanes, mask=mask, other=0.0).to(WIDE)
    return new, e0


@triton.jit
def scan_start(
    states, predictions, drift, state_coef, model_coef, first, begin, b, B, D, lanes, mask,
    L: tl.constexpr, DRIFT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """What the recursion carries into row `begin`: the last states and predictions, from the known row `first` on."""
    x0 = known_row(states, first, b, B, D, lanes, mask, WIDE)
    x1, x2, x3 = earlier_rows(states, first, x0, b, B, D, lanes, mask, L, WIDE)
    e1, e2, e3 = earlier_rows(predictions, first, x0, b, B, D, lanes, mask, L, WIDE)
    for i in tl.range(first, begin, loop_unroll_factor=4):
        new, e0 = scan_row(
            i, b, B, D, lanes, mask, x0, x1, x2, x3, e1, e2, e3, predictions, drift, state_coef, model_coef,
            L, DRIFT, WIDE,
        )  # fmt: skip
        if L > 3:
            x3, e3 = x2, e2
        if L > 2:
            x2, e2 = x1, e1
        if L > 1:
            x1, e1 = x0, e0
        x0 = new
    return x0, x1, x2, x3, e1, e2, e3
