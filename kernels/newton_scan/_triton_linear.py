"""Triton kernels of the scan of a linear model: a quasi-Newton round without secants, two launches.

N[i+1] = sum_l a[i,l] N[i-l] + b[i,l] Ê[i-l] + drift[i], Ê[i] = E[i] + c[i] (N[i] - X[i]), c the slope (Gonzalez et al.
2024, arXiv 2407.19115). Elementwise over D: one program per sample and block of D carries N and the plain scan F in
registers. Bytes: 3 elements per state element (E and X in, N out), or 5 with a ring of one column.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import _config
from .._launches import launcher
from .._triton_rows import combined, drift_row, known_row, larger, own_column, scan_start, slope_row, window
from .._workspace import ProblemSize, cut
from . import linear_layout


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
        plain = combined(i, x0, x1, x2, x3, e0, e1, e2, e3, state_coef, model_coef, L, WIDE) + noise
        new = combined(i, n0, n1, n2, n3, h0, h1, h2, h3, state_coef, model_coef, L, WIDE) + noise
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


def launch_linear(
    states: Tensor, predictions: Tensor, tables: tuple[Tensor, ...], sq_diff: Tensor, sq_norm: Tensor,
    rings: tuple[Tensor | None, ...], drift: Tensor | None, workspace: Tensor | None,
) -> None:  # fmt: skip
    """On contiguous tensors. tables: slope, state_coef, model_coef, lo, hi. rings: z, e of one column and filled, or
    three times None."""
    (steps, batch, size), device, (slope, state_coef, _, lo, hi) = predictions.shape, states.device, tables
    config, lags = _config.config("newton_linear", device), state_coef.shape[1]
    plan = linear_layout(ProblemSize(steps, batch, size, lags, states.dtype, device))
    partials = cut(plan, workspace, device)["partials"]
    width = steps if rings[0] is None else rings[0].shape[1]
    launcher(newton_linear_kernel, (partials.shape[2] * batch,))(
        states, predictions, drift, *tables, *rings, partials, steps, batch, size, width, L=lags,
        DRIFT=drift is not None, SPECTRAL=slope.shape[1] > 1, RING=0 if rings[0] is None else 1,
        BLOCK=config.block(states.element_size()), num_warps=config.num_warps, enable_fp_fusion=True,
    )  # fmt: skip
    launcher(newton_norms_kernel, (batch * min(steps, width),))(
        partials, lo, hi, sq_diff, sq_norm, steps, batch, width, partials.shape[2], SPAN=64, num_warps=1,
        enable_fp_fusion=True,
    )  # fmt: skip
