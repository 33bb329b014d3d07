"""What a quasi-Newton round can do for all rows at once, before its scan over time.

1. `newton_prepare_kernel`: the plain scan F, for |F - X|^2, and the Gram of the secants dz_j = z_j - X with |X|^2, per
   block of D; this round's states and predictions go into their ring column. Bytes: E, X and H columns of z in, a
   column of z and of e out, H + 4 elements per state element.
2. `newton_weights_kernel`: sums over blocks in a fixed order, and S = Z (Z dZ^T dZ Z + ridge)^-1 Z of every row, with Z
   the inverse lengths of the columns worth keeping: the least squares weights are then gamma = S dZ^T dX (Fang and Saad
   2009, doi 10.1002/nla.617, on normalised columns). float64: a ridge of 1e-6 leaves float32 one digit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .._triton_rows import chunk_of, known_row, older_columns, own_column, scan_row, scan_start, window


@triton.jit(do_not_specialize=["T", "W", "column", "chunks"])
def newton_prepare_kernel(
    states, predictions, drift, state_coef, model_coef, lo, hi, z, e, filled, e_hat, exact, partials, T, B, D, W,
    column, chunks, L: tl.constexpr, DRIFT: tl.constexpr, MIXED: tl.constexpr, RING: tl.constexpr, P: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of D, one sample, one chunk of rows. partials: (T, B, blocks, P * P + 2): Gram, |X|^2, |F - X|^2.

    MIXED: the rings are stored narrower than the states; exact (T, B, D) keeps X, around which the model is linear.
    """
    WIDE: tl.constexpr = tl.float64 if states.dtype.element_ty == tl.float64 else tl.float32
    blocks = tl.cdiv(D, BLOCK)
    block, rest = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    b = rest % B
    first, last = window(lo, hi, b, tl.minimum(T, tl.load(lo + b) + W))
    begin, end = chunk_of(first, last, rest // B, chunks)
    if begin >= end:
        return
    lanes = block * BLOCK + tl.arange(0, BLOCK)
    mask = lanes < D
    slots = tl.arange(0, P)
    x0, x1, x2, x3, e1, e2, e3 = scan_start(
        states, predictions, drift, state_coef, model_coef, first, begin, b, B, D, lanes, mask, L, DRIFT, WIDE
    )
    if L > 1:  # noqa: SIM102 (before the window the linearised predictions are what the model said)
        if begin == first:
            tl.store(own_column(e_hat, first + L - 1, b, B, D, L, 0) + lanes, e1, mask=mask)
            if L > 2:
                tl.store(own_column(e_hat, first + L - 2, b, B, D, L, 0) + lanes, e2, mask=mask)
            if L > 3:
                tl.store(own_column(e_hat, first + L - 3, b, B, D, L, 0) + lanes, e3, mask=mask)
    x = known_row(states, begin, b, B, D, lanes, mask, WIDE)
    for i in tl.range(begin, end):
        old = known_row(states, i + 1, b, B, D, lanes, mask, WIDE)
        new, e0 = scan_row(
            i, b, B, D, lanes, mask, x0, x1, x2, x3, e1, e2, e3, predictions, drift, state_coef, model_coef,
            L, DRIFT, WIDE,
        )  # fmt: skip
        bound = tl.where(slots < tl.load(filled + (i % W) * B + b), tl.where(slots < RING - 1, D, 0), 0)
        past = older_columns(z, i, b, B, D, W, column, lanes, bound, RING, P, WIDE)
        dz = tl.where(lanes[None, :] < bound[:, None], past - x[None, :], 0.0)
        tl.store(own_column(z, i, b, B, D, W, column) + lanes, x.to(z.dtype.element_ty), mask=mask)
        if MIXED:
            tl.store(exact + (tl.cast(i, tl.int64) * B + b) * D + lanes, x.to(exact.dtype.element_ty), mask=mask)
        tl.store(own_column(e, i, b, B, D, W, column) + lanes, e0.to(e.dtype.element_ty), mask=mask)
        sums = partials + ((tl.cast(i, tl.int64) * B + b) * blocks + block) * (P * P + 2)
        for k in tl.static_range(RING - 1):
            dz_k = tl.sum(tl.where(slots[:, None] == k, dz, 0.0), axis=0)
            tl.store(sums + k * P + slots, tl.sum(dz * dz_k[None, :], axis=1))
        tl.store(sums + P * P, tl.sum(x * x))
        tl.store(sums + P * P + 1, tl.sum((new - old) * (new - old)))
        if L > 3:
            x3, e3 = x2, e2
        if L > 2:
            x2, e2 = x1, e1
        if L > 1:
            x1, e1 = x0, e0
        x0, x = new, old


@triton.jit
def inverse(system, P: tl.constexpr):
    """Inverse (P, P) of a symmetric positive definite matrix, in place; zero where rounding made it neither."""
    row_of, col_of = tl.arange(0, P)[:, None], tl.arange(0, P)[None, :]
    sound = 1
    for c in tl.range(0, P):
        row = tl.sum(tl.where(row_of == c, system, 0.0), axis=0)[None, :]
        col = tl.sum(tl.where(col_of == c, system, 0.0), axis=1)[:, None]
        pivot = tl.sum(tl.where(col_of == c, row, 0.0))
        sound = tl.where(pivot > 0, sound, 0)
        by = 1.0 / tl.where(pivot > 0, pivot, 1.0)
        swept = tl.where((row_of == c) & (col_of == c), by, tl.where(col_of == c, -col * by, row * by))
        system = tl.where((row_of == c) | (col_of == c), swept, system - col * row * by)
    broken = tl.sum(tl.where(tl.abs(system) < float("inf"), 0, 1))
    return tl.where((sound == 1) & (broken == 0), system, 0.0)


@triton.jit
def secant_fit(gram, norm, known, ridge, floor, P: tl.constexpr):
    """S (P, P) from dZ^T dZ (P, P) in float64 and |X|^2; zero for columns not known: (P,), and for those too short."""
    eye = tl.arange(0, P)[:, None] == tl.arange(0, P)[None, :]
    length = tl.sqrt(tl.sum(tl.where(eye, gram, 0.0), axis=1))
    keep = known & (length > tl.full((), floor, tl.float64) * tl.sqrt(norm))  # shorter steps are rounding
    scale = tl.where(keep, 1.0 / tl.where(keep, length, 1.0), 0.0)
    both = scale[:, None] * scale[None, :]
    system = tl.where(both > 0, gram * both, 0.0)
    system += tl.where(eye, tl.where(keep, tl.full((), ridge, tl.float64), 1.0)[:, None], 0.0)
    return inverse(system, P) * both


@triton.jit
def gram_sums(partials, row, blocks, known, K: tl.constexpr, P: tl.constexpr, SPAN: tl.constexpr):
    """Sums over blocks of partials (rows, blocks, K), float64: the Gram (P, P) of the columns known (P,), |X|^2
    after it and, where K has room for it, one entry more."""
    slots, span = tl.arange(0, P), tl.arange(0, SPAN)
    gram = tl.zeros((P, P), tl.float64)
    norm, other = tl.zeros((SPAN,), tl.float64), tl.zeros((SPAN,), tl.float64)
    for start in tl.range(0, blocks, SPAN):
        here = start + span < blocks
        at = partials + (row * blocks + start + span) * K
        tile = at[:, None, None] + slots[None, :, None] * P + slots[None, None, :]
        wanted = here[:, None, None] & known[None, :, None] & known[None, None, :]
        gram += tl.sum(tl.load(tile, mask=wanted, other=0.0).to(tl.float64), axis=0)
        norm += tl.load(at + P * P, mask=here, other=0.0).to(tl.float64)
        if K > P * P + 1:
            other += tl.load(at + P * P + 1, mask=here, other=0.0).to(tl.float64)
    return gram, tl.sum(norm), tl.sum(other)


@triton.jit(do_not_specialize=["T", "W", "blocks"])
def newton_weights_kernel(
    partials, lo, hi, filled, secant_weights, sq_diff, T, B, W, blocks, ridge: tl.float64, floor: tl.float64,
    RING: tl.constexpr, P: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """One row of one sample. secant_weights (T, B, P, P) float64: S, zero on the diagonal for columns not to read."""
    b = tl.program_id(0) % B
    first, last = window(lo, hi, b, tl.minimum(T, tl.load(lo + b) + W))
    i = first + tl.program_id(0) // B
    if i >= last:
        return
    row, slots = tl.cast(i, tl.int64) * B + b, tl.arange(0, P)
    valid = filled + (i % W) * B + b
    count = tl.minimum(tl.maximum(tl.load(valid), 0), RING - 1)
    known = slots < count
    gram, norm, residual = gram_sums(partials, row, blocks, known, P * P + 2, P, SPAN)
    solved = secant_fit(gram, norm, known, ridge, floor, P)
    tl.store(secant_weights + row * (P * P) + slots[:, None] * P + slots[None, :], solved)
    tl.store(sq_diff + row, residual.to(sq_diff.dtype.element_ty))
    tl.store(valid, count + 1)
