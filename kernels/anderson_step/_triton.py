"""Triton kernels of one Anderson round: three launches, none of which the host waits for.

1. `anderson_scan_kernel`: F by the scan of ddim_update, G = F - X, and the new Gram row <G, G_j>, in one pass over E, X
   and the other M - 1 columns of g; writes F and G.
2. `anderson_solve_kernel` (_triton_solve.py): sums over blocks, Gram, alpha = argmin |G alpha|^2 + ridge |alpha|^2.
3. `anderson_mix_kernel`: X <- sum_j alpha_j (F_j - (1 - damping) G_j) over the columns with alpha_j != 0.

Formula: Walker and Ni 2011, SIAM J. Numer. Anal. 49(4), eq. 2.2; on trajectories: Pokle et al. 2022, arXiv 2210.12867,
alg. 1. Bytes: M + 3 elements per state element in pass 1 and M + 1 in pass 3: 2 M + 4 undamped, 3 M + 4 damped. Row
lo[b] takes the plain step in pass 1. Sums are taken in a fixed order: the same bits every time.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import _config
from .._launches import launcher
from .._triton_rows import chunk_of, scan_row, scan_start, window
from .._workspace import ProblemSize, cut
from . import layout
from ._triton_solve import anderson_solve_kernel


@triton.jit(do_not_specialize=["T", "W", "column", "chunks"])
def anderson_scan_kernel(
    states, predictions, drift, state_coef, model_coef, lo, hi, f, g, filled, partials, T, B, D, W, column, chunks,
    L: tl.constexpr, DRIFT: tl.constexpr, M: tl.constexpr, K: tl.constexpr, MIXED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of D, one sample, one chunk of rows. partials: (T, B, blocks, K >= M + 2): the Gram row, |G|^2, |F|^2.

    MIXED: the history is stored narrower than the states, so the full F goes to states, for the mix to read.
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
    entry = tl.arange(0, K)
    x0, x1, x2, x3, e1, e2, e3 = scan_start(
        states, predictions, drift, state_coef, model_coef, first, begin, b, B, D, lanes, mask, L, DRIFT, WIDE
    )
    for i in tl.range(begin, end):
        slot = i % W
        target = states + (tl.cast(i + 1, tl.int64) * B + b) * D + lanes
        valid = tl.load(filled + slot * B + b) + 1
        old = tl.load(target, mask=mask, other=0.0).to(WIDE)
        new, e0 = scan_row(
            i, b, B, D, lanes, mask, x0, x1, x2, x3, e1, e2, e3, predictions, drift, state_coef, model_coef,
            L, DRIFT, WIDE,
        )  # fmt: skip
        diff = new - old
        kept = diff.to(g.dtype.element_ty)
        stored = kept.to(WIDE)
        sums = tl.where(entry == column, tl.sum(stored * stored), 0.0)
        sums = tl.where(entry == M, tl.sum(diff * diff), sums)
        sums = tl.where(entry == M + 1, tl.sum(new * new), sums)
        for age in tl.static_range(1, M):  # every load of the row comes before its first store
            j = (column + M - age) % M
            past = g + (tl.cast(j * W + slot, tl.int64) * B + b) * D + lanes
            column_j = tl.load(past, mask=lanes < tl.where(age < valid, D, 0), other=0.0).to(WIDE)
            sums = tl.where(entry == j, tl.sum(stored * column_j), sums)
        own = (tl.cast(column * W + slot, tl.int64) * B + b) * D + lanes
        tl.store(f + own, new.to(f.dtype.element_ty), mask=mask)
        tl.store(g + own, kept, mask=mask)
        tl.store(partials + ((tl.cast(i, tl.int64) * B + b) * blocks + block) * K + entry, sums, mask=entry < M + 2)
        if MIXED or i == first:
            tl.store(target, new.to(states.dtype.element_ty), mask=mask)
        if L > 3:
            x3, e3 = x2, e2
        if L > 2:
            x2, e2 = x1, e1
        if L > 1:
            x1, e1 = x0, e0
        x0 = new


@triton.jit(do_not_specialize=["T", "W", "column"])
def anderson_mix_kernel(
    states, lo, hi, f, g, filled, alpha, T, B, D, W, column, undamped: tl.float64,
    M: tl.constexpr, DAMPED: tl.constexpr, MIXED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of D, one sample, one row. alpha: (T, B, M), zero for columns that must not be read."""
    WIDE: tl.constexpr = alpha.dtype.element_ty
    blocks = tl.cdiv(D, BLOCK)
    block, rest = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    b = rest % B
    first, last = window(lo, hi, b, tl.minimum(T, tl.load(lo + b) + W))
    i = first + rest // B
    if i >= last:
        return
    slot = i % W
    if block == 0:
        count = filled + slot * B + b
        tl.store(count, tl.minimum(tl.load(count) + 1, M))
    if i > first:  # row `first` has its plain step already
        lanes = block * BLOCK + tl.arange(0, BLOCK)
        target = states + (tl.cast(i + 1, tl.int64) * B + b) * D + lanes
        mask = lanes < D
        at = (tl.cast(column * W + slot, tl.int64) * B + b) * D + lanes
        newest = tl.load(target if MIXED else f + at, mask=mask, other=0.0).to(WIDE)
        if DAMPED:
            newest -= tl.full((), undamped, WIDE) * tl.load(g + at, mask=mask, other=0.0).to(WIDE)
        mixed = newest
        for age in tl.static_range(1, M):  # differences: the weights sum to one only up to rounding
            j = (column + M - age) % M
            weight = tl.load(alpha + (tl.cast(i, tl.int64) * B + b) * M + j)
            mask = lanes < tl.where(weight != 0, D, 0)
            at = (tl.cast(j * W + slot, tl.int64) * B + b) * D + lanes
            past = tl.load(f + at, mask=mask, other=0.0).to(WIDE)
            if DAMPED:
                past -= tl.full((), undamped, WIDE) * tl.load(g + at, mask=mask, other=0.0).to(WIDE)
            mixed += weight * (past - newest)
        tl.store(target, mixed.to(states.dtype.element_ty), mask=lanes < D)


def launch(
    states: Tensor, predictions: Tensor, state_coef: Tensor, model_coef: Tensor, lo: Tensor, hi: Tensor,
    sq_diff: Tensor, sq_norm: Tensor, f: Tensor, g: Tensor, gram: Tensor, filled: Tensor, column: int, scope: str,
    ridge: float, relative_ridge: bool, damping: float, stale: float, drift: Tensor | None,
    workspace: Tensor | None = None, chunks: int | None = None,
) -> None:  # fmt: skip
    """The op on contiguous tensors: three launches. chunks overrides how many parts the window is cut into."""
    (steps, batch, size), (history, width), device = predictions.shape, f.shape[:2], states.device
    rows = min(steps, width)
    scan, solve, mix = (_config.config(op, device) for op in ("anderson_scan", "anderson_solve", "anderson_mix"))
    narrow = min(f.element_size(), g.element_size())  # 16-byte accesses for this one, more of them for the others
    block = scan.block(narrow)
    plan = layout(ProblemSize(steps, batch, size, state_coef.shape[1], states.dtype, device), history, narrow)
    partials, alpha = cut(plan, workspace, device).values()
    blocks, entries = partials.shape[2:]
    chunks = chunks or _config.scan_chunks(blocks * batch, rows, device)
    mixed = f.dtype != states.dtype
    launcher(anderson_scan_kernel, (blocks * batch * chunks,))(
        states, predictions, drift, state_coef, model_coef, lo, hi, f, g, filled, partials, steps, batch, size, width,
        column, chunks, L=state_coef.shape[1], DRIFT=drift is not None, M=history, K=entries, MIXED=mixed, BLOCK=block,
        num_warps=scan.num_warps, enable_fp_fusion=True,
    )  # fmt: skip
    launcher(anderson_solve_kernel, (triton.cdiv(rows, solve.rows) * batch,))(
        partials, lo, hi, gram, filled, alpha, sq_diff, sq_norm, steps, batch, width, blocks, column, ridge, stale,
        SCOPE=scope, RELATIVE=relative_ridge, M=history, P=triton.next_power_of_2(history), K=entries,
        ROWS=solve.rows, PRIOR=solve.prior, num_warps=solve.num_warps * gram.element_size() // 4, enable_fp_fusion=True,
    )  # fmt: skip
    block = mix.block(narrow if damping != 1.0 else f.element_size())
    launcher(anderson_mix_kernel, (triton.cdiv(size, block) * batch * rows,))(
        states, lo, hi, f, g, filled, alpha, steps, batch, size, width, column, 1.0 - damping,
        M=history, DAMPED=damping != 1.0, MIXED=mixed, BLOCK=block, num_warps=mix.num_warps, enable_fp_fusion=True,
    )  # fmt: skip
