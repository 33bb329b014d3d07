"""The multisecant recursion without a pass over D for every row: products of all rows at once, then small numbers only.

For one lag. With p_i = a_i + b_i c_i elementwise, G_i = p_0 ... p_{i-1}, and dx_i = N_i - X_i, the linearised chain is
dx_{i+1} = p_i dx_i + r_i + b_i R_i gamma_i with gamma_i = S_i dZ_i^T dx_i, R_i = dE_i - c_i dZ_i and the defect
r_i = a_i X_i + b_i E_i + drift_i - X_{i+1}. So dx_i = G_i sum_{j < i} (r_j + b_j R_j gamma_j) / G_{j+1}, and all that
gamma needs of D is

    P[i, j] = (dZ_i G_i)^T [r_j, b_j R_j] / G_{j+1}        (T H x T (H + 1), lower triangle, one product over D)

1. `gains_kernel`: G. 2. `products_kernel`: P, tile by tile. 3. `recursion_kernel`: gamma, row by row, one program per
sample, P and S only. 4. `corrected_scan_kernel`: N, elementwise over D; `newton_norms_kernel` adds up its norms.
G_i / G_{j+1} shrinks where the chain contracts; a gamma that is not finite is dropped, which leaves the slope.
Multisecants: Fang and Saad 2009, doi 10.1002/nla.617. float32, sums in a fixed order. Worth it where D is large: the
sequential form passes over D on one multiprocessor. Bytes: 2 H + 5 elements per state element in the last scan.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .._launches import launcher
from .._triton_rows import drift_row, known_row, older_columns, slope_row, window

TILE, SPAN = 32, 32  # entries of a tile, so that nothing spills; elements of D at a time


@triton.jit(do_not_specialize=["T"])
def gains_kernel(slope, state_coef, model_coef, gains, T, D, SPECTRAL: tl.constexpr, BLOCK: tl.constexpr):
    """One block of D. gains (T + 1, D): G."""
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = lanes < D
    gain = tl.zeros((BLOCK,), tl.float32) + 1.0
    tl.store(gains + lanes, gain, mask=mask)
    for i in tl.range(0, T, loop_unroll_factor=4):
        c = slope_row(slope, i, D, lanes, mask, SPECTRAL, tl.float32)
        gain *= tl.fma(tl.load(model_coef + i).to(tl.float32), c, tl.load(state_coef + i).to(tl.float32))
        tl.store(gains + tl.cast(i + 1, tl.int64) * D + lanes, gain, mask=mask)


@triton.jit
def secant_at(ring, row, slot, b, B, D, W, column, lanes, mask, RING: tl.constexpr):
    """Rows `row` (M,) of the ring column written 1 + slot rounds ago, (M, lanes)."""
    columns = (column + 2 * RING - 1 - slot) % RING
    at = ((columns * W + row % W).to(tl.int64) * B + b) * D
    return tl.load(ring + at[:, None] + lanes[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["T", "W", "column"])
def products_kernel(
    states, predictions, drift, slope, state_coef, model_coef, lo, hi, z, e, secant_weights, gains, products, T, B, D,
    W, column, DRIFT: tl.constexpr, SPECTRAL: tl.constexpr, RING: tl.constexpr, P: tl.constexpr, Q: tl.constexpr,
    ROWS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """A tile of one sample: rows i against rows j < i. products (B, T, P, T, Q)."""
    tiles = tl.cdiv(W, ROWS)
    b, rest = tl.program_id(0) % B, tl.program_id(0) // B
    first, last = window(lo, hi, b, tl.minimum(T, tl.load(lo + b) + W))
    tile_i, tile_j = rest // tiles, rest % tiles
    if (tile_j > tile_i) | (first + tile_i * ROWS >= last):
        return
    left, right = tl.arange(0, ROWS * P), tl.arange(0, ROWS * Q)
    i, h = first + tile_i * ROWS + left // P, left % P
    j, k = first + tile_j * ROWS + right // Q, right % Q
    own = ((tl.cast(i, tl.int64) * B + b) * P + h) * P + h
    kept_i = (i < last) & (tl.load(secant_weights + own, mask=i < last) != 0)
    secant = tl.maximum(k - 1, 0)
    diagonal = ((tl.cast(j, tl.int64) * B + b) * P + secant) * P + secant
    kept_j = (j < last) & (k > 0) & (secant < P)
    kept_j = kept_j & (tl.load(secant_weights + diagonal, mask=kept_j, other=0.0) != 0)
    defect = (j < last) & (k == 0)
    a = tl.load(state_coef + j, mask=j < last, other=0.0).to(tl.float32)[:, None]
    g = tl.load(model_coef + j, mask=j < last, other=0.0).to(tl.float32)[:, None]
    row_i, row_j = (tl.cast(i, tl.int64) * B + b) * D, (tl.cast(j, tl.int64) * B + b) * D
    total = tl.zeros((ROWS * P, ROWS * Q), tl.float32)
    for start in tl.range(0, D, SPAN):
        lanes = start + tl.arange(0, SPAN)
        inside = (lanes < D)[None, :]
        mask_i, mask_j, mask_d = kept_i[:, None] & inside, kept_j[:, None] & inside, defect[:, None] & inside
        x = tl.load(states + row_i[:, None] + lanes[None, :], mask=mask_i, other=0.0).to(tl.float32)
        dz = secant_at(z, i, h, b, B, D, W, column, lanes, mask_i, RING) - x
        gain = tl.load(gains + tl.cast(i, tl.int64)[:, None] * D + lanes[None, :], mask=mask_i, other=0.0)
        here = mask_j | mask_d
        x_j = tl.load(states + row_j[:, None] + lanes[None, :], mask=here, other=0.0).to(tl.float32)
        e_j = tl.load(predictions + row_j[:, None] + lanes[None, :], mask=here, other=0.0).to(tl.float32)
        after = tl.load(states + (row_j + B * D)[:, None] + lanes[None, :], mask=mask_d, other=0.0).to(tl.float32)
        r = tl.fma(a, x_j, g * e_j) - after
        if DRIFT:
            r += tl.load(drift + row_j[:, None] + lanes[None, :], mask=mask_d, other=0.0).to(tl.float32)
        if SPECTRAL:
            c = tl.load(slope + tl.cast(j, tl.int64)[:, None] * D + lanes[None, :], mask=mask_j, other=0.0)
        else:
            c = tl.load(slope + j, mask=j < last, other=0.0)[:, None]
        dz_j = secant_at(z, j, secant, b, B, D, W, column, lanes, mask_j, RING) - x_j
        de_j = secant_at(e, j, secant, b, B, D, W, column, lanes, mask_j, RING) - e_j
        v = tl.where(mask_d, r, tl.where(mask_j, g * (de_j - c.to(tl.float32) * dz_j), 0.0))
        over = tl.load(gains + tl.cast(j + 1, tl.int64)[:, None] * D + lanes[None, :], mask=here, other=1.0)
        total = tl.dot(dz * gain, tl.trans(v / over), total, input_precision="ieee")
    at = products + (((tl.cast(b, tl.int64) * T + i) * P + h)[:, None] * T + j[None, :]) * Q + k[None, :]
    tl.store(at, total, mask=(i < last)[:, None] & (j < last)[None, :])


@triton.jit(do_not_specialize=["T", "W"])
def recursion_kernel(
    lo, hi, secant_weights, products, gamma, T, B, W, P: tl.constexpr, Q: tl.constexpr, SPAN: tl.constexpr
):  # fmt: skip
    """One sample, its rows in order. gamma (B, T, Q): one, then the weights of the secants."""
    b = tl.program_id(0)
    first, last = window(lo, hi, b, tl.minimum(T, tl.load(lo + b) + W))
    slots, span = tl.arange(0, P), tl.arange(0, SPAN)
    own = gamma + tl.cast(b, tl.int64) * T * Q
    for i in tl.range(first, last):
        fit = tl.load(secant_weights + ((tl.cast(i, tl.int64) * B + b) * P + slots[:, None]) * P + slots[None, :])
        row = products + ((tl.cast(b, tl.int64) * T + i) * P + slots) * T * Q
        dots = tl.zeros((P,), tl.float64)
        for start in tl.range(first * Q, i * Q, SPAN):
            at = start + span
            known = tl.load(own + at, mask=at < i * Q, other=0.0)
            share = tl.load(row[:, None] + at[None, :], mask=(at < i * Q)[None, :], other=0.0)
            dots += tl.sum(share * known[None, :], axis=1).to(tl.float64)
        found = tl.sum(fit * dots[None, :], axis=1)
        found = tl.where(tl.abs(found) < float("inf"), found, 0.0).to(tl.float32)
        tl.store(own + i * Q, 1.0)
        tl.store(own + i * Q + 1 + slots, found, mask=slots < Q - 1)
        tl.debug_barrier()


@triton.jit(do_not_specialize=["T", "W", "column"])
def corrected_scan_kernel(
    states, predictions, drift, slope, state_coef, model_coef, lo, hi, z, e, secant_weights, gamma, sq_diff, partials,
    T, B, D, W, column, DRIFT: tl.constexpr, SPECTRAL: tl.constexpr, RING: tl.constexpr, P: tl.constexpr,
    Q: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of D, one sample. partials (T, B, blocks, 3): |N - X|^2, the plain residual (block 0), |N|^2."""
    blocks = tl.cdiv(D, BLOCK)
    block, b = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    first, last = window(lo, hi, b, tl.minimum(T, tl.load(lo + b) + W))
    lanes, slots = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, P)
    mask = lanes < D
    x = known_row(states, first, b, B, D, lanes, mask, tl.float32)
    now = x
    for i in tl.range(first, last):
        row = tl.cast(i, tl.int64) * B + b
        out = known_row(predictions, i, b, B, D, lanes, mask, tl.float32)
        old = known_row(states, i + 1, b, B, D, lanes, mask, tl.float32)
        c = slope_row(slope, i, D, lanes, mask, SPECTRAL, tl.float32)
        bound = tl.where(tl.load(secant_weights + row * (P * P) + slots * (P + 1)) != 0, D, 0)
        share = tl.load(gamma + (tl.cast(b, tl.int64) * T + i) * Q + 1 + slots, mask=slots < Q - 1, other=0.0)
        dz = older_columns(z, i, b, B, D, W, column, lanes, bound, RING, P, tl.float32) - x[None, :]
        de = older_columns(e, i, b, B, D, W, column, lanes, bound, RING, P, tl.float32) - out[None, :]
        correction = tl.where((bound > 0)[:, None], share[:, None] * (de - c[None, :] * dz), 0.0)
        hat = tl.fma(c, now - x, out) + tl.sum(correction, axis=0)
        new = tl.fma(tl.load(state_coef + i).to(tl.float32), now, tl.load(model_coef + i).to(tl.float32) * hat)
        new += drift_row(drift, i, b, B, D, lanes, mask, DRIFT, tl.float32)
        tl.store(states + (row + B) * D + lanes, new.to(states.dtype.element_ty), mask=mask)
        sums = partials + (row * blocks + block) * 3
        tl.store(sums, tl.sum((new - old) * (new - old)))
        tl.store(sums + 1, tl.where(block == 0, tl.load(sq_diff + row), 0.0).to(tl.float32))
        tl.store(sums + 2, tl.sum(new * new))
        x, now = old, new


def launch_products(
    states: Tensor, predictions: Tensor, drift: Tensor | None, tables: tuple[Tensor, ...], z: Tensor, e: Tensor,
    sq_diff: Tensor, column: int, block: int, warps: int, scratch: dict[str, Tensor],
) -> None:  # fmt: skip
    """From the secant weights of a round to its states, four launches. tables: slope, state_coef, model_coef, lo, hi.
    scratch: see `_layout.secant_layout`; receives the partial sums for `newton_norms_kernel` as "norms"."""
    (steps, batch, size), ring, width = predictions.shape, z.shape[0], z.shape[1]
    secant_weights, gains, products, gamma, partials = (
        scratch[name] for name in ("secant_weights", "gains", "products", "gamma", "norms")
    )
    spectral, pairs, entries = tables[0].shape[1] > 1, secant_weights.shape[-1], gamma.shape[-1]
    blocks = partials.shape[2]
    shape = {"SPECTRAL": spectral, "enable_fp_fusion": True}
    launcher(gains_kernel, (triton.cdiv(size, 128),))(*tables[:3], gains, steps, size, BLOCK=128, num_warps=1, **shape)
    launcher(products_kernel, (triton.cdiv(width, TILE // entries) ** 2 * batch,))(
        states, predictions, drift, *tables, z, e, secant_weights, gains, products, steps, batch, size, width, column,
        DRIFT=drift is not None, RING=ring, P=pairs, Q=entries, ROWS=TILE // entries, SPAN=SPAN, num_warps=4,
        num_stages=2, **shape,
    )  # fmt: skip
    launcher(recursion_kernel, (batch,))(
        *tables[3:], secant_weights, products, gamma, steps, batch, width, P=pairs, Q=entries, SPAN=512, num_warps=4,
        enable_fp_fusion=True,
    )  # fmt: skip
    launcher(corrected_scan_kernel, (blocks * batch,))(
        states, predictions, drift, *tables, z, e, secant_weights, gamma, sq_diff, partials, steps, batch, size, width,
        column, DRIFT=drift is not None, RING=ring, P=pairs, Q=entries, BLOCK=block, num_warps=warps, **shape,
    )  # fmt: skip
