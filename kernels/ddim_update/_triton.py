"""Triton kernels of the batched DDIM update: an affine scan over time, elementwise over D, with its residual norms.

F[i+1] = sum_{l<L} state_coef[i,l] F[i-l] + model_coef[i,l] E[i-l] + drift[i], L <= 4: the sampler's own step (DDIM:
Song et al. 2021, arXiv 2010.02502, eq. 12; multistep: Lu et al. 2022, arXiv 2211.01095). One program carries the last L
states of one block of D in registers through the rows of one sample's window, so E and X are read once and F is written
once: 3 elements per state element. When B * D alone cannot fill the device, the window is cut into chunks of rows; each
program then repeats the recursion over the rows before its chunk, which reads E only, so that the result does not
depend, bit for bit, on the number of chunks.

Norms are summed per block, then over blocks by a second kernel in a fixed order: no atomics, the same bits every time.
Arithmetic is float32, or float64 if the states are; offsets are int64; the tail of D is masked.
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


@triton.jit(do_not_specialize=["T", "chunks"])
def ddim_update_kernel(
    states, predictions, drift, state_coef, model_coef, lo, hi, partials, T, B, D, chunks,
    L: tl.constexpr, DRIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of D, one sample, one chunk of rows. partials: (T, B, blocks, 2)."""
    WIDE: tl.constexpr = tl.float64 if states.dtype.element_ty == tl.float64 else tl.float32
    blocks = tl.cdiv(D, BLOCK)
    block, rest = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    b = rest % B
    first, last = window(lo, hi, b, T)
    begin, end = chunk_of(first, last, rest // B, chunks)
    if begin >= end:
        return
    lanes = block * BLOCK + tl.arange(0, BLOCK)
    mask = lanes < D
    x0, x1, x2, x3, e1, e2, e3 = scan_start(
        states, predictions, drift, state_coef, model_coef, first, begin, b, B, D, lanes, mask, L, DRIFT, WIDE
    )
    for i in tl.range(begin, end):
        target = states + (tl.cast(i + 1, tl.int64) * B + b) * D + lanes
        old = tl.load(target, mask=mask, other=0.0).to(WIDE)
        new, e0 = scan_row(
            i, b, B, D, lanes, mask, x0, x1, x2, x3, e1, e2, e3, predictions, drift, state_coef, model_coef,
            L, DRIFT, WIDE,
        )  # fmt: skip
        tl.store(target, new.to(states.dtype.element_ty), mask=mask)
        diff = new - old
        sums = partials + ((tl.cast(i, tl.int64) * B + b) * blocks + block) * 2
        tl.store(sums, tl.sum(diff * diff))
        tl.store(sums + 1, tl.sum(new * new))
        if L > 3:
            x3, e3 = x2, e2
        if L > 2:
            x2, e2 = x1, e1
        if L > 1:
            x1, e1 = x0, e0
        x0 = new


@triton.jit(do_not_specialize=["T", "blocks"])
def ddim_norms_kernel(
    partials, lo, hi, sq_diff, sq_norm, T, B, blocks, K: tl.constexpr, AT: tl.constexpr, ROWS: tl.constexpr,
    SPAN: tl.constexpr,
):  # fmt: skip
    """Sums over blocks of entries AT and AT + 1 of partials (T, B, blocks, K), for ROWS rows of one sample."""
    b = tl.program_id(0) % B
    first, last = window(lo, hi, b, T)
    i = first + (tl.program_id(0) // B) * ROWS + tl.arange(0, ROWS)
    if tl.min(i) >= last:
        return
    row = i.to(tl.int64) * B + b
    span = tl.arange(0, SPAN)
    diff = tl.zeros((ROWS,), partials.dtype.element_ty)
    norm = tl.zeros((ROWS,), partials.dtype.element_ty)
    for start in tl.range(0, blocks, SPAN):
        at = (row[:, None] * blocks + start + span[None, :]) * K + AT
        mask = (i < last)[:, None] & (start + span < blocks)[None, :]
        diff += tl.sum(tl.load(partials + at, mask=mask, other=0.0), axis=1)
        norm += tl.sum(tl.load(partials + at + 1, mask=mask, other=0.0), axis=1)
    tl.store(sq_diff + row, diff.to(sq_diff.dtype.element_ty), mask=i < last)
    tl.store(sq_norm + row, norm.to(sq_norm.dtype.element_ty), mask=i < last)


def launch_norms(
    partials: Tensor, lo: Tensor, hi: Tensor, sq_diff: Tensor, sq_norm: Tensor, rows: int, entry: int
) -> None:
    """sq_diff, sq_norm <- sums over blocks of entries `entry` and `entry + 1` of partials (T, B, blocks, K)."""
    steps, batch, blocks, entries = partials.shape
    launcher(ddim_norms_kernel, (batch * triton.cdiv(rows, 16),))(
        partials, lo, hi, sq_diff, sq_norm, steps, batch, blocks, K=entries, AT=entry, ROWS=16, SPAN=64, num_warps=4,
        enable_fp_fusion=True,
    )  # fmt: skip


def launch(
    states: Tensor, predictions: Tensor, state_coef: Tensor, model_coef: Tensor, lo: Tensor, hi: Tensor,
    sq_diff: Tensor, sq_norm: Tensor, drift: Tensor | None, workspace: Tensor | None = None,
    chunks: int | None = None,
) -> None:  # fmt: skip
    """The op on contiguous tensors: two launches. chunks overrides how many parts the window is cut into."""
    steps, batch, size = predictions.shape
    config = _config.config("ddim_update", states.device)
    block = config.block(states.element_size())
    plan = layout(ProblemSize(steps, batch, size, state_coef.shape[1], states.dtype, states.device))
    partials = cut(plan, workspace, states.device)["partials"]
    blocks = partials.shape[2]
    chunks = chunks or _config.scan_chunks(blocks * batch, steps, states.device)
    launcher(ddim_update_kernel, (blocks * batch * chunks,))(
        states, predictions, drift, state_coef, model_coef, lo, hi, partials, steps, batch, size, chunks,
        L=state_coef.shape[1], DRIFT=drift is not None, BLOCK=block, num_warps=config.num_warps,
        enable_fp_fusion=True,
    )  # fmt: skip
    launch_norms(partials, lo, hi, sq_diff, sq_norm, steps, 0)
