"""Triton kernels of the quasi-Newton scan: at most three launches, seven where D is large; the host waits for none.

N[i+1] = sum_l a[i,l] N[i-l] + b[i,l] Ê[i-l] + drift[i], Ê[i] = E[i] + J[i] (N[i] - X[i]), J[i] a slope plus a
multisecant correction (Lim et al. 2024, arXiv 2309.12252; Gonzalez et al. 2024, arXiv 2407.19115; Fang and Saad 2009).

Slope alone: elementwise over D, one program per sample and block of D, N and the plain scan F carried in registers.
With secants every row needs dots over all of D before it can advance. What does not depend on N, the plain scan, the
Grams, their inverses and the ring writes, is done beforehand and in parallel (_triton_prepare.py); the scan proper is
one program per sample and one pass over D per row, which also takes the dots that the next row needs. Where D is large
for one program, _triton_products.py takes all dots at once instead.

Bytes: the scan proper reads E, X, the new state and this round's column of z, H columns of z and of e, and the next
row's z again (from cache), and writes the state: 2 H + 5 elements per state element, with the preparation 3 H + 9;
slope alone: 3, or 5 with a ring of one column.

Sums are taken in a fixed order: the same bits every time. Arithmetic is float32, or float64 if the states are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _config
from ..ddim_update._triton import known_row, scan_start, window
from ._triton_prepare import newton_prepare_kernel, newton_weights_kernel, older_columns, own_column
from ._triton_products import by_products


@triton.jit
def combined(
    i, x0, x1, x2, x3, e0, e1, e2, e3, noise, state_coef, model_coef, L: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """The state that follows row i; x_l, e_l are the states and predictions of l rows before."""
    a, c = state_coef + i * L, model_coef + i * L
    new = tl.fma(tl.load(a).to(WIDE), x0, tl.load(c).to(WIDE) * e0)
    if L > 1:
        new = tl.fma(tl.load(c + 1).to(WIDE), e1, tl.fma(tl.load(a + 1).to(WIDE), x1, new))
    if L > 2:
        new = tl.fma(tl.load(c + 2).to(WIDE), e2, tl.fma(tl.load(a + 2).to(WIDE), x2, new))
    if L > 3:
        new = tl.fma(tl.load(c + 3).to(WIDE), e3, tl.fma(tl.load(a + 3).to(WIDE), x3, new))
    return new + noise


@triton.jit
def slope_row(slope, i, D, lanes, mask, SPECTRAL: tl.constexpr, WIDE: tl.constexpr):
    if SPECTRAL:
        return tl.load(slope + tl.cast(i, tl.int64) * D + lanes, mask=mask, other=0.0).to(WIDE)
    return tl.zeros(lanes.shape, WIDE) + tl.load(slope + i).to(WIDE)


@triton.jit
def drift_row(drift, i, b, B, D, lanes, mask, DRIFT: tl.constexpr, WIDE: tl.constexpr):
    if DRIFT:
        return known_row(drift, i, b, B, D, lanes, mask, WIDE)
    return tl.zeros(lanes.shape, WIDE)


@triton.jit
def larger(step, residual):
    """Their maximum, NaN if either is."""
    return tl.where((step > residual) | (step != step), step, residual)


@triton.jit(do_not_specialize=["T", "W"])
def newton_linear_kernel(
    states, predictions, drift, slope, state_coef, model_coef, lo, hi, z, e, filled, partials, T, B, D, W,
    L: tl.constexpr, DRIFT: tl.constexpr, SPECTRAL: tl.constexpr, RING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of D, one sample. partials: (T, B, blocks, 3): |N - X|^2, |F - X|^2, |N|^2. RING: 0 or 1 columns."""
    WIDE: tl.constexpr = tl.float64 if states.dtype.element_ty == tl.float64 else tl.float32
    blocks = tl.cdiv(D, BLOCK)
    block, b = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    first, last = window(lo, hi, b, tl.minimum(T, tl.load(lo + b) + W))
    lanes = block * BLOCK + tl.arange(0, BLOCK)
    mask = lanes < D
    x0, x1, x2, x3, e1, e2, e3 = scan_start(
        states, predictions, drift, state_coef, model_coef, first, first, b, B, D, lanes, mask, L, DRIFT, WIDE
    )
    n0, n1, n2, n3, h1, h2, h3 = x0, x1, x2, x3, e1, e2, e3
    x = x0
    for i in tl.range(first, last):
        e0 = known_row(predictions, i, b, B, D, lanes, mask, WIDE)
        old = known_row(states, i + 1, b, B, D, lanes, mask, WIDE)
        noise = drift_row(drift, i, b, B, D, lanes, mask, DRIFT, WIDE)
        h0 = tl.fma(slope_row(slope, i, D, lanes, mask, SPECTRAL, WIDE), n0 - x if RING else n0, e0)
        plain = combined(i, x0, x1, x2, x3, e0, e1, e2, e3, noise, state_coef, model_coef, L, WIDE)
        new = combined(i, n0, n1, n2, n3, h0, h1, h2, h3, noise, state_coef, model_coef, L, WIDE)
        if RING:
            tl.store(own_column(z, i, b, B, D, W, 0) + lanes, x.to(z.dtype.element_ty), mask=mask)
            tl.store(own_column(e, i, b, B, D, W, 0) + lanes, e0.to(e.dtype.element_ty), mask=mask)
            tl.store(filled + (i % W) * B + b, 1, mask=block == 0)
            x = old
        at = (tl.cast(i + 1, tl.int64) * B + b) * D
        tl.store(states + at + lanes, new.to(states.dtype.element_ty), mask=mask)
        sums = partials + ((tl.cast(i, tl.int64) * B + b) * blocks + block) * 3
        tl.store(sums, tl.sum((new - old) * (new - old)))
        tl.store(sums + 1, tl.sum((plain - old) * (plain - old)))
        tl.store(sums + 2, tl.sum(new * new))
        if L > 3:
            x3, n3, e3, h3 = x2, n2, e2, h2
        if L > 2:
            x2, n2, e2, h2 = x1, n1, e1, h1
        if L > 1:
            x1, n1, e1, h1 = x0, n0, e0, h0
        x0, n0 = plain, new


@triton.jit(do_not_specialize=["T", "W", "blocks"])
def newton_norms_kernel(partials, lo, hi, sq_diff, sq_norm, T, B, W, blocks, SPAN: tl.constexpr):
    """Sums over blocks of partials (T, B, blocks, 3), for one row of one sample."""
    b = tl.program_id(0) % B
    first, last = window(lo, hi, b, tl.minimum(T, tl.load(lo + b) + W))
    i = first + tl.program_id(0) // B
    if i >= last:
        return
    row, span = tl.cast(i, tl.int64) * B + b, tl.arange(0, SPAN)
    step = tl.zeros((SPAN,), partials.dtype.element_ty)
    residual, norm = step, step
    for start in tl.range(0, blocks, SPAN):
        at, mask = partials + (row * blocks + start + span) * 3, start + span < blocks
        step += tl.load(at, mask=mask, other=0.0)
        residual += tl.load(at + 1, mask=mask, other=0.0)
        norm += tl.load(at + 2, mask=mask, other=0.0)
    tl.store(sq_diff + row, larger(tl.sum(step), tl.sum(residual)).to(sq_diff.dtype.element_ty))
    tl.store(sq_norm + row, tl.sum(norm).to(sq_norm.dtype.element_ty))


@triton.jit(do_not_specialize=["T", "W", "column"])
def newton_advance_kernel(
    states, predictions, drift, slope, state_coef, model_coef, lo, hi, z, e, weights, e_hat, exact, sq_diff, sq_norm,
    T, B, D, W, column, L: tl.constexpr, DRIFT: tl.constexpr, SPECTRAL: tl.constexpr, MIXED: tl.constexpr,
    RING: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One sample, all its rows. e_hat: (L, B, D), row i in slot i % L. On entry it holds the predictions before the
    window, sq_diff |F - X|^2, and this round's ring column X (or `exact` does, see `newton_prepare_kernel`).

    A row reads states and e_hat that rows before it wrote: the barrier at the end of a row makes them visible.
    """
    WIDE: tl.constexpr = tl.float64 if states.dtype.element_ty == tl.float64 else tl.float32
    b = tl.program_id(0)
    first, last = window(lo, hi, b, tl.minimum(T, tl.load(lo + b) + W))
    slots = tl.arange(0, P)
    dots = tl.zeros((P,), tl.float64)  # row `first` starts from its own state: dX = 0
    for i in tl.range(first, last):
        row, after = tl.cast(i, tl.int64) * B + b, tl.minimum(i + 1, last - 1)
        fit = tl.load(weights + row * (P * P) + slots[:, None] * P + slots[None, :])
        bound = tl.where(tl.load(weights + row * (P * P) + slots * (P + 1)) != 0, D, 0)
        ahead = weights + (tl.cast(after, tl.int64) * B + b) * (P * P)
        bound_after = tl.where(tl.load(ahead + slots * (P + 1)) != 0, D, 0)
        gamma = tl.sum(fit * dots[None, :], axis=1)
        gamma = tl.where(tl.abs(gamma) < float("inf"), gamma, 0.0).to(WIDE)[:, None]
        step, norm = tl.zeros((BLOCK,), WIDE), tl.zeros((BLOCK,), WIDE)
        products = tl.zeros((P, BLOCK), WIDE)
        for start in tl.range(0, D, BLOCK):
            lanes = start + tl.arange(0, BLOCK)
            mask = lanes < D
            out = known_row(predictions, i, b, B, D, lanes, mask, WIDE)
            now = known_row(states, i, b, B, D, lanes, mask, WIDE)
            old = known_row(states, i + 1, b, B, D, lanes, mask, WIDE)
            if MIXED:
                x = known_row(exact, i, b, B, D, lanes, mask, WIDE)
            else:
                x = tl.load(own_column(z, i, b, B, D, W, column) + lanes, mask=mask, other=0.0).to(WIDE)
            c = slope_row(slope, i, D, lanes, mask, SPECTRAL, WIDE)
            noise = drift_row(drift, i, b, B, D, lanes, mask, DRIFT, WIDE)
            dz = older_columns(z, i, b, B, D, W, column, lanes, bound, RING, P, WIDE) - x[None, :]
            de = older_columns(e, i, b, B, D, W, column, lanes, bound, RING, P, WIDE) - out[None, :]
            hat = tl.fma(c, now - x, out) + tl.sum(gamma * (de - c[None, :] * dz), axis=0)
            x1, x2, x3, e1, e2, e3 = now, now, now, now, now, now
            if L > 1:
                x1 = known_row(states, i - 1, b, B, D, lanes, mask, WIDE)
                e1 = known_row(e_hat, (i + L - 1) % L, b, B, D, lanes, mask, WIDE)
            if L > 2:
                x2 = known_row(states, i - 2, b, B, D, lanes, mask, WIDE)
                e2 = known_row(e_hat, (i + L - 2) % L, b, B, D, lanes, mask, WIDE)
            if L > 3:
                x3 = known_row(states, i - 3, b, B, D, lanes, mask, WIDE)
                e3 = known_row(e_hat, (i + L - 3) % L, b, B, D, lanes, mask, WIDE)
            new = combined(i, now, x1, x2, x3, hat, e1, e2, e3, noise, state_coef, model_coef, L, WIDE)
            later = older_columns(z, after, b, B, D, W, column, lanes, bound_after, RING, P, WIDE)
            stored = new.to(states.dtype.element_ty)
            moved = tl.where(lanes[None, :] < bound_after[:, None], later - old[None, :], 0.0)
            products += moved * (stored.to(WIDE) - old)[None, :]
            step += (new - old) * (new - old)
            norm += new * new
            tl.store(states + ((tl.cast(i + 1, tl.int64) * B + b) * D) + lanes, stored, mask=mask)
            if L > 1:
                tl.store(own_column(e_hat, i, b, B, D, L, 0) + lanes, hat, mask=mask)
        dots = tl.sum(products, axis=1).to(tl.float64)
        residual = tl.load(sq_diff + row)
        tl.store(sq_diff + row, larger(tl.sum(step).to(residual.dtype), residual))
        tl.store(sq_norm + row, tl.sum(norm).to(sq_norm.dtype.element_ty))
        tl.debug_barrier()


def launch(
    states: Tensor, predictions: Tensor, state_coef: Tensor, model_coef: Tensor, slope: Tensor, lo: Tensor, hi: Tensor,
    sq_diff: Tensor, sq_norm: Tensor, z: Tensor | None, e: Tensor | None, filled: Tensor | None, column: int,
    ridge: float, floor: float, drift: Tensor | None, chunks: int | None = None, products: bool | None = None,
) -> None:  # fmt: skip
    """The op on contiguous tensors. chunks overrides how many parts the window is cut into beforehand, products whether
    the scan is made of products (_triton_products.py) or passes over D row by row."""
    (steps, batch, size), device, lags = predictions.shape, states.device, state_coef.shape[1]
    ring, width = (0, steps) if z is None else (z.shape[0], z.shape[1])
    rows, secants = min(steps, width), max(ring - 1, 0)
    wide = torch.float64 if states.dtype == torch.float64 else torch.float32
    shape: dict[str, int | bool] = {"L": lags, "DRIFT": drift is not None}
    spectral = {"SPECTRAL": slope.shape[1] > 1}
    tables = (slope, state_coef, model_coef, lo, hi)
    if not secants:
        config = _config.config("newton_linear", device)
        block = config.block(states.element_size())
        blocks = triton.cdiv(size, block)
        partials = torch.empty((steps, batch, blocks, 3), dtype=wide, device=device)
        newton_linear_kernel[(blocks * batch,)](
            states, predictions, drift, *tables, z, e, filled, partials, steps, batch, size, width, **shape, **spectral,
            RING=ring, BLOCK=block, num_warps=config.num_warps, enable_fp_fusion=True,
        )  # fmt: skip
        newton_norms_kernel[(batch * rows,)](
            partials, lo, hi, sq_diff, sq_norm, steps, batch, width, blocks, SPAN=64, num_warps=1,
            enable_fp_fusion=True,
        )  # fmt: skip
        return
    prepare, advance = _config.config("newton_prepare", device), _config.config("newton_advance", device)
    assert z is not None
    assert e is not None
    mixed, narrow = z.dtype != states.dtype, z.element_size()  # the narrowest element: 16-byte accesses for all
    block, pairs = prepare.block(narrow), triton.next_power_of_2(secants)
    blocks, span = triton.cdiv(size, block), advance.block(narrow if pairs < 8 else wide.itemsize)
    chunks = chunks or _config.scan_chunks(blocks * batch, rows, device)
    partials = torch.empty((steps, batch, blocks, pairs**2 + 2), dtype=wide, device=device)
    weights = torch.empty((steps, batch, pairs, pairs), dtype=torch.float64, device=device)
    e_hat = torch.empty((lags, batch, size), dtype=wide, device=device) if lags > 1 else None
    if products is None:
        products = _config.newton_products(steps, batch, size, pairs, lags, states.dtype)
    mixed = mixed and not products  # by products the states stay until their last use
    exact = torch.empty_like(states[1:]) if mixed else None
    newton_prepare_kernel[(blocks * batch * chunks,)](
        states, predictions, drift, *tables[1:], z, e, filled, e_hat, exact, partials, steps, batch, size, width,
        column, chunks, **shape, MIXED=mixed, RING=ring, P=pairs, BLOCK=block, num_warps=prepare.num_warps,
        enable_fp_fusion=True,
    )  # fmt: skip
    newton_weights_kernel[(batch * rows,)](
        partials, lo, hi, filled, weights, sq_diff, steps, batch, width, blocks, ridge, floor, RING=ring, P=pairs,
        SPAN=8, num_warps=1, enable_fp_fusion=True,
    )  # fmt: skip
    if products:
        partials = by_products(
            states, predictions, drift, tables, z, e, weights, sq_diff, column, block, prepare.num_warps
        )
        newton_norms_kernel[(batch * rows,)](
            partials, lo, hi, sq_diff, sq_norm, steps, batch, width, partials.shape[2], SPAN=64, num_warps=1,
            enable_fp_fusion=True,
        )  # fmt: skip
        return
    newton_advance_kernel[(batch,)](
        states, predictions, drift, *tables, z, e, weights, e_hat, exact, sq_diff, sq_norm, steps, batch, size,
        width, column, **shape, **spectral, MIXED=mixed, RING=ring, P=pairs, BLOCK=span,
        num_warps=advance.num_warps, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip
