"""The middle kernel of an Anderson round: sums over blocks, Gram update, and the small solve, batched over rows.

alpha = argmin |G alpha|^2 + ridge |alpha|^2 with sum alpha = 1, that is (Gram + ridge) alpha ~ 1, by Gauss-Jordan
elimination on the diagonally scaled system, newest column first. A column whose pivot vanishes beside those before it
(zero, or a combination of newer ones) drops out with weight zero, so rank deficiency is harmless.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .._triton_rows import window


@triton.jit
def block_sums(partials, row, blocks, entry, wanted, K: tl.constexpr, SPAN: tl.constexpr):
    """Sums over blocks of entries `entry` (P,) of partials (T, B, blocks, K), for rows (R,), where wanted (R, P)."""
    span = tl.arange(0, SPAN)
    total = tl.zeros(wanted.shape, partials.dtype.element_ty)
    for start in tl.range(0, blocks, SPAN):
        at = (row[:, None, None] * blocks + start + span[None, :, None]) * K + entry[None, None, :]
        here = wanted[:, None, :] & (start + span < blocks)[None, :, None]
        total += tl.sum(tl.load(partials + at, mask=here, other=0.0), axis=1)
    return total


@triton.jit
def age_of(slots, column, M: tl.constexpr):
    """How many rounds ago each ring column was written; beyond M for the padding."""
    return tl.where(slots < M, (column - slots + M) % M, M)


@triton.jit
def updated_gram(
    i, valid, b, B, W, blocks, column, partials, gram, filled,
    M: tl.constexpr, P: tl.constexpr, K: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """For rows i (R,): the Gram (R, P, P) with its new row and column, that row (R, P), and the valid columns (R,).

    Entries in row or column `column` are never read, so that programs may write theirs while others read.
    """
    ACC: tl.constexpr = gram.dtype.element_ty
    slots = tl.arange(0, P)
    slot = (i % W).to(tl.int64) * B + b
    count = tl.minimum(tl.maximum(tl.load(filled + slot, mask=valid, other=M), 0) + 1, M)
    known = valid[:, None] & (age_of(slots, column, M)[None, :] < count[:, None])
    fresh = block_sums(partials, i.to(tl.int64) * B + b, blocks, slots, known, K, SPAN).to(ACC)
    older = known & (slots != column)[None, :]
    at = slot[:, None, None] * (M * M) + slots[None, :, None] * M + slots[None, None, :]
    full = tl.load(gram + at, mask=older[:, :, None] & older[:, None, :], other=0.0)
    is_row, is_col = (slots == column)[None, :, None], (slots == column)[None, None, :]
    full = tl.where(is_row, fresh[:, None, :], tl.where(is_col, fresh[:, :, None], full))
    return full, fresh, count


@triton.jit
def solve_alpha(total, known, column, ridge, stale, RELATIVE: tl.constexpr, M: tl.constexpr, P: tl.constexpr):
    """alpha (R, P) of the Grams total (R, P, P), over the columns known (R, P)."""
    ACC: tl.constexpr = total.dtype
    DOUBLE: tl.constexpr = total.dtype == tl.float64
    TINY: tl.constexpr = 2e-15 if DOUBLE else 1e-6  # 8 roundings of a pivot that began as 1
    slots = tl.arange(0, P)[None, :]
    row_of, col_of = tl.arange(0, P)[None, :, None], tl.arange(0, P)[None, None, :]
    diagonal = tl.sum(tl.where(row_of == col_of, total, 0.0), axis=2)
    newest = tl.sum(tl.where(slots == column, diagonal, 0.0), axis=1)
    keep = known & ((slots == column) | (diagonal <= tl.full((), stale, ACC) * newest[:, None]))
    shift = tl.full((), ridge, ACC) * (diagonal if RELATIVE else tl.full(diagonal.shape, 1.0, ACC))
    level = tl.where(keep, diagonal + shift, 0.0)
    rhs = tl.where(level > 0, 1.0 / tl.sqrt(tl.where(level > 0, level, 1.0)), 0.0)
    scale = rhs
    system = tl.where(row_of == col_of, (diagonal + shift)[:, :, None], total)
    system = tl.where(keep[:, :, None] & keep[:, None, :], system, 0.0) * scale[:, :, None] * scale[:, None, :]
    for age in tl.static_range(M):
        c = (column + M - age) % M
        row = tl.sum(tl.where(row_of == c, system, 0.0), axis=1)
        col = tl.sum(tl.where(col_of == c, system, 0.0), axis=2)
        pivot = tl.sum(tl.where(slots == c, row, 0.0), axis=1)
        sound = (pivot > TINY)[:, None]
        factor = tl.where(sound & (slots != c), col / tl.where(pivot > TINY, pivot, 1.0)[:, None], 0.0)
        dropped = ((row_of == c) | (col_of == c)) & (pivot <= TINY)[:, None, None]
        system = tl.where(dropped, 0.0, system - factor[:, :, None] * row[:, None, :])
        value = tl.sum(tl.where(slots == c, rhs, 0.0), axis=1)
        rhs = tl.where((slots == c) & (pivot <= TINY)[:, None], 0.0, rhs - factor * value[:, None])
    pivots = tl.sum(tl.where(row_of == col_of, system, 0.0), axis=2)
    alpha = tl.where(pivots > TINY, rhs / tl.where(pivots > TINY, pivots, 1.0), 0.0) * scale
    weight = tl.sum(alpha, axis=1)
    alpha = alpha / tl.where(weight > 0, weight, 1.0)[:, None]
    broken = tl.sum(tl.where(tl.abs(alpha) < float("inf"), 0, 1), axis=1)
    usable = (newest > 0) & (weight > 0) & (broken == 0)
    return tl.where(usable[:, None], alpha, tl.where(slots == column, 1.0, 0.0))


@triton.jit(do_not_specialize=["T", "W", "blocks", "column"])
def anderson_solve_kernel(
    partials, lo, hi, gram, filled, alpha, sq_diff, sq_norm, T, B, W, blocks, column, ridge: tl.float64,
    stale: tl.float64, SCOPE: tl.constexpr, RELATIVE: tl.constexpr, M: tl.constexpr, P: tl.constexpr, K: tl.constexpr,
    ROWS: tl.constexpr, PRIOR: tl.constexpr,
):  # fmt: skip
    """ROWS rows of one sample. Rows that share an alpha (SCOPE) are summed by every program that needs them."""
    ACC: tl.constexpr = gram.dtype.element_ty
    b = tl.program_id(0) % B
    first, last = window(lo, hi, b, tl.minimum(T, tl.load(lo + b) + W))
    begin = first + (tl.program_id(0) // B) * ROWS
    if begin >= last:
        return
    i = begin + tl.arange(0, ROWS)
    valid = i < last
    slots = tl.arange(0, P)
    total, fresh, count = updated_gram(i, valid, b, B, W, blocks, column, partials, gram, filled, M, P, K, 32)
    slot, row = (i % W).to(tl.int64) * B + b, i.to(tl.int64) * B + b
    inner = valid[:, None] & (age_of(slots, column, M)[None, :] < count[:, None])
    tl.store(gram + slot[:, None] * (M * M) + column * M + slots[None, :], fresh, mask=inner)
    above = inner & (slots != column)[None, :]
    tl.store(gram + slot[:, None] * (M * M) + slots[None, :] * M + column, fresh, mask=above)
    if SCOPE != "timestep":
        until = begin if SCOPE == "triangular" else last
        others = tl.zeros((P, P), ACC)
        least = tl.full((), M, tl.int32)
        for start in tl.range(first, until, PRIOR):
            j = start + tl.arange(0, PRIOR)
            gram_j, _, count_j = updated_gram(
                j, j < until, b, B, W, blocks, column, partials, gram, filled, M, P, K, 8
            )  # fmt: skip
            others += tl.sum(gram_j, axis=0)
            least = tl.minimum(least, tl.min(count_j))
        if SCOPE == "triangular":
            total = tl.cumsum(total, axis=0) + others[None, :, :]
            earlier = tl.arange(0, ROWS)[:, None] >= tl.arange(0, ROWS)[None, :]
            count = tl.minimum(tl.min(tl.where(earlier, count[None, :], M), axis=1), least)
        else:
            total = tl.zeros((ROWS, P, P), ACC) + others[None, :, :]
            count = tl.zeros((ROWS,), tl.int32) + least
    known = valid[:, None] & (age_of(slots, column, M)[None, :] < count[:, None])
    weights = solve_alpha(total, known, column, ridge, stale, RELATIVE, M, P)
    weights = tl.where(known, weights, 0.0).to(alpha.dtype.element_ty)
    tl.store(alpha + row[:, None] * M + slots[None, :], weights, mask=valid[:, None] & (slots < M)[None, :])
    norms = tl.arange(0, 2)[None, :]
    sums = block_sums(partials, row, blocks, M + tl.arange(0, 2), valid[:, None] & (norms >= 0), K, 32)
    diff, norm = tl.sum(tl.where(norms == 0, sums, 0.0), axis=1), tl.sum(tl.where(norms == 1, sums, 0.0), axis=1)
    tl.store(sq_diff + row, diff.to(sq_diff.dtype.element_ty), mask=valid)
    tl.store(sq_norm + row, norm.to(sq_norm.dtype.element_ty), mask=valid)
