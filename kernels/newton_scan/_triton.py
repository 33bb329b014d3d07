"""Triton kernels of the quasi-Newton scan: at most three launches; the host waits for none.

N[i+1] = sum_l a[i,l] N[i-l] + b[i,l] Ê[i-l] + drift[i], Ê[i] = E[i] + J[i] (N[i] - X[i]), J[i] a slope plus a
multisecant correction (Lim et al. 2024, arXiv 2309.12252; Gonzalez et al. 2024, arXiv 2407.19115; Fang and Saad 2009).

Slope alone: _triton_linear.py. With secants every row needs dots over all of D before it can advance. What does not
depend on N, plain scan, Grams, their inverses and ring writes, is done beforehand and in parallel, _triton_prepare.py;
the scan proper is one program per sample and one pass over D per row, which also takes the dots of the next row.

Bytes: the scan proper reads E, X, the new state and this round's column of z, H columns of z and of e, and the next
row's z again (from cache), and writes the state: 2 H + 5 elements per state element, with the preparation 3 H + 9.

Sums are taken in a fixed order: the same bits every time. Arithmetic is float32, or float64 if the states are.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import _config
from .._launches import launcher
from .._triton_rows import combined, drift_row, known_row, larger, older_columns, own_column, slope_row, window
from .._workspace import ProblemSize, cut
from . import secant_layout
from ._triton_linear import launch_linear
from ._triton_prepare import newton_prepare_kernel, newton_weights_kernel


@triton.jit(do_not_specialize=["T", "W", "column"])
def newton_advance_kernel(
    states, predictions, drift, slope, state_coef, model_coef, lo, hi, z, e, secant_weights, e_hat, exact, sq_diff,
    sq_norm, T, B, D, W, column, L: tl.constexpr, DRIFT: tl.constexpr, SPECTRAL: tl.constexpr, MIXED: tl.constexpr,
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
        fit = tl.load(secant_weights + row * (P * P) + slots[:, None] * P + slots[None, :])
        bound = tl.where(tl.load(secant_weights + row * (P * P) + slots * (P + 1)) != 0, D, 0)
        ahead = secant_weights + (tl.cast(after, tl.int64) * B + b) * (P * P)
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
            new = combined(i, now, x1, x2, x3, hat, e1, e2, e3, state_coef, model_coef, L, WIDE) + noise
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
    ridge: float, floor: float, drift: Tensor | None, workspace: Tensor | None = None, chunks: int | None = None,
) -> None:  # fmt: skip
    """The op on contiguous tensors. chunks overrides how many parts the window is cut into beforehand."""
    tables = (slope, state_coef, model_coef, lo, hi)
    if z is None or z.shape[0] == 1:
        launch_linear(states, predictions, tables, sq_diff, sq_norm, (z, e, filled), drift, workspace)
        return
    ring, width = z.shape[:2]
    (steps, batch, numel), device, lags = predictions.shape, states.device, state_coef.shape[1]
    rows, size = min(steps, width), ProblemSize(steps, batch, numel, lags, states.dtype, device)
    scratch = cut(secant_layout(size, ring, z.dtype), workspace, device)
    partials, secant_weights = scratch["partials"], scratch["secant_weights"]
    e_hat, exact = scratch.get("e_hat"), scratch.get("exact")
    prepare, advance = _config.config("newton_prepare", device), _config.config("newton_advance", device)
    narrow = z.element_size()  # the narrowest element: 16-byte accesses for all
    block, pairs, blocks = prepare.block(narrow), secant_weights.shape[-1], partials.shape[2]
    span = advance.block(narrow if pairs < 8 else partials.element_size())
    chunks = chunks or _config.scan_chunks(blocks * batch, rows, device)
    shape = {"L": lags, "DRIFT": drift is not None, "MIXED": exact is not None, "RING": ring, "P": pairs}
    launcher(newton_prepare_kernel, (blocks * batch * chunks,))(
        states, predictions, drift, *tables[1:], z, e, filled, e_hat, exact, partials, steps, batch, numel, width,
        column, chunks, **shape, BLOCK=block, num_warps=prepare.num_warps, enable_fp_fusion=True,
    )  # fmt: skip
    launcher(newton_weights_kernel, (batch * rows,))(
        partials, lo, hi, filled, secant_weights, sq_diff, steps, batch, width, blocks, ridge, floor, RING=ring,
        P=pairs, SPAN=8, num_warps=1, enable_fp_fusion=True,
    )  # fmt: skip
    launcher(newton_advance_kernel, (batch,))(
        states, predictions, drift, *tables, z, e, secant_weights, e_hat, exact, sq_diff, sq_norm, steps, batch, numel,
        width, column, **shape, SPECTRAL=slope.shape[1] > 1, BLOCK=span, num_warps=advance.num_warps, num_stages=1,
        enable_fp_fusion=True,
    )  # fmt: skip
