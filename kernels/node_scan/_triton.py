"""Triton kernel of the scan over nodes: one launch, elementwise over D.

y_l <- sum_m state_coef[j,l,m,k] y_m + sum_s remainder_coef[j,l,s,k] remainder[start[j]+s] + drift[j,l], states[j+1] <-
y_0 (exponential integrators: Hochbruck and Ostermann 2010, doi 10.1017/S0962492910000048). One program carries the L <=
4 values y of one block of D of one sample in registers through all steps. Bytes: for each state element one remainder
in, a step's others being in the cache from the step before, L drifts in and one state out; coefficients come from
tables that the cache keeps. Nothing that is loaded waits for what was computed, so two steps are loaded before the
first of them is stored: on a small problem the time is the memory's latency, here once for both.

Arithmetic is float32, or float64 if the states are; offsets are int64; the tail of D is masked; a start or a class out
of range is clamped.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import _config
from .._launches import launcher
from .._triton_rows import drift_row, known_row


@triton.jit
def coefficient(table, k, K, kind, CLASSES: tl.constexpr):
    """Row k of a table (rows, K), by class."""
    row = table + tl.cast(k, tl.int64) * K
    if CLASSES:
        return tl.load(row + kind, eviction_policy="evict_last")
    return tl.zeros(kind.shape, table.dtype.element_ty) + tl.load(row)


@triton.jit
def interpolated(
    j, b, M, B, D, K, lanes, mask, kind, remainder, remainder_coef, start, drift, L: tl.constexpr, S: tl.constexpr,
    CLASSES: tl.constexpr, DRIFT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """What step j adds to each of the carried values: remainders and drift."""
    first = tl.minimum(tl.maximum(tl.load(start + j), 0), M - S)
    at, row = j * L, j * L * S
    r0 = drift_row(drift, at, b, B, D, lanes, mask, DRIFT, WIDE)
    r1, r2, r3 = r0, r0, r0
    if L > 1:
        r1 = drift_row(drift, at + 1, b, B, D, lanes, mask, DRIFT, WIDE)
    if L > 2:
        r2 = drift_row(drift, at + 2, b, B, D, lanes, mask, DRIFT, WIDE)
    if L > 3:
        r3 = drift_row(drift, at + 3, b, B, D, lanes, mask, DRIFT, WIDE)
    for s in tl.static_range(S):
        nearby = known_row(remainder, first + s, b, B, D, lanes, mask, WIDE)
        r0 = tl.fma(coefficient(remainder_coef, row + s, K, kind, CLASSES), nearby, r0)
        if L > 1:
            r1 = tl.fma(coefficient(remainder_coef, row + S + s, K, kind, CLASSES), nearby, r1)
        if L > 2:
            r2 = tl.fma(coefficient(remainder_coef, row + 2 * S + s, K, kind, CLASSES), nearby, r2)
        if L > 3:
            r3 = tl.fma(coefficient(remainder_coef, row + 3 * S + s, K, kind, CLASSES), nearby, r3)
    return r0, r1, r2, r3


@triton.jit
def combined_lag(row, K, kind, y0, y1, y2, y3, total, state_coef, L: tl.constexpr, CLASSES: tl.constexpr):
    """total + sum_m state_coef[row + m] y_m."""
    total = tl.fma(coefficient(state_coef, row, K, kind, CLASSES), y0, total)
    if L > 1:
        total = tl.fma(coefficient(state_coef, row + 1, K, kind, CLASSES), y1, total)
    if L > 2:
        total = tl.fma(coefficient(state_coef, row + 2, K, kind, CLASSES), y2, total)
    if L > 3:
        total = tl.fma(coefficient(state_coef, row + 3, K, kind, CLASSES), y3, total)
    return total


@triton.jit
def advanced(j, K, kind, y0, y1, y2, y3, r0, r1, r2, r3, state_coef, L: tl.constexpr, CLASSES: tl.constexpr):
    """The carried values after step j."""
    n0 = combined_lag(j * L * L, K, kind, y0, y1, y2, y3, r0, state_coef, L, CLASSES)
    n1, n2, n3 = n0, n0, n0
    if L > 1:
        n1 = combined_lag((j * L + 1) * L, K, kind, y0, y1, y2, y3, r1, state_coef, L, CLASSES)
    if L > 2:
        n2 = combined_lag((j * L + 2) * L, K, kind, y0, y1, y2, y3, r2, state_coef, L, CLASSES)
    if L > 3:
        n3 = combined_lag((j * L + 3) * L, K, kind, y0, y1, y2, y3, r3, state_coef, L, CLASSES)
    return n0, n1, n2, n3


@triton.jit(do_not_specialize=["T", "M", "K"])
def node_scan_kernel(
    states, remainder, state_coef, remainder_coef, start, classes, drift, T, M, B, D, K, L: tl.constexpr,
    S: tl.constexpr, CLASSES: tl.constexpr, DRIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of D, one sample."""
    WIDE: tl.constexpr = state_coef.dtype.element_ty
    blocks = tl.cdiv(D, BLOCK)
    block, b = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    lanes = block * BLOCK + tl.arange(0, BLOCK)
    mask = lanes < D
    kind = tl.zeros((BLOCK,), tl.int32)
    if CLASSES:
        kind = tl.minimum(tl.maximum(tl.load(classes + lanes, mask=mask, other=0), 0), K - 1)
    y0 = known_row(states, 0, b, B, D, lanes, mask, WIDE)
    y1 = tl.zeros((BLOCK,), WIDE)
    y2, y3 = y1, y1
    for j in tl.range(0, T, 2):
        other = tl.minimum(j + 1, T - 1)  # where T is odd the last step is made twice, and stored once
        r0, r1, r2, r3 = interpolated(
            j, b, M, B, D, K, lanes, mask, kind, remainder, remainder_coef, start, drift, L, S, CLASSES, DRIFT, WIDE
        )
        n0, n1, n2, n3 = advanced(j, K, kind, y0, y1, y2, y3, r0, r1, r2, r3, state_coef, L, CLASSES)
        q0, q1, q2, q3 = interpolated(
            other, b, M, B, D, K, lanes, mask, kind, remainder, remainder_coef, start, drift, L, S, CLASSES, DRIFT, WIDE
        )
        y0, y1, y2, y3 = advanced(other, K, kind, n0, n1, n2, n3, q0, q1, q2, q3, state_coef, L, CLASSES)
        target = states + (tl.cast(j + 1, tl.int64) * B + b) * D + lanes
        tl.store(target, n0.to(states.dtype.element_ty), mask=mask)
        following = states + (tl.cast(other + 1, tl.int64) * B + b) * D + lanes
        tl.store(following, y0.to(states.dtype.element_ty), mask=lanes < tl.where(other == j, 0, D))


def launch(
    states: Tensor, remainder: Tensor, state_coef: Tensor, remainder_coef: Tensor, start: Tensor,
    classes: Tensor | None, drift: Tensor | None,
) -> None:  # fmt: skip
    """The op on contiguous tensors: one launch."""
    (nodes, batch, size), lags, stencil = remainder.shape, state_coef.shape[1], remainder_coef.shape[2]
    config = _config.config("node_scan", states.device)
    block = config.block(states.element_size())
    if batch:
        launcher(node_scan_kernel, (triton.cdiv(size, block) * batch,))(
            states, remainder, state_coef, remainder_coef, start, classes, drift, len(start), nodes, batch,
            size, state_coef.shape[3], L=lags, S=stencil, CLASSES=classes is not None, DRIFT=drift is not None,
            BLOCK=block, num_warps=config.num_warps, enable_fp_fusion=True,
        )  # fmt: skip
