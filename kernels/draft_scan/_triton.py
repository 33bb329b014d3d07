"""The Triton kernel of a segment of a draft's sweep: one launch between two calls of the draft.

N[i+1] = sum_l a[i,l] N[i-l] + b[i,l] Ê[i-l] + drift[i], Ê[i] = E[i] + c[i] (N[i] - X[i]) + what the draft adds (see
reference.py; deferred correction, Lions, Maday, Turinici 2001). Elementwise over D but for the dots of the secants with
the step N - X at an anchor: a program takes those of the next anchor for its own block of D as soon as it has made that
state, and every program of the next segment adds them up, in a fixed order. So a segment needs one launch, and no
program waits for another.

Bytes of a sweep, one lag: E and X in, N out, 3 elements per state element; and per element of an anchor's state, with H
secants, N, the draft's output and its cache, a correction, F, a column of z and H + 1 of the remainder in, H columns of
z of the next anchor in; the cache, a correction and F out: 2 H + 10.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import _config
from .._triton_rows import combined, drift_row, known_row, older_columns, own_column, slope_row, window
from .._workspace import ProblemSize, cut
from ..newton_scan._triton_linear import launch_norms
from . import MAX_OUTPUT, layout


@triton.jit
def lagged(
    states, predictions, carry, row, low, b, B, D, lanes, mask, L: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """Of a row before the segment: N, F, Ê and E; before `low` all are what they were."""
    n, e = known_row(states, row, b, B, D, lanes, mask, WIDE), known_row(predictions, row, b, B, D, lanes, mask, WIDE)
    at, size = tl.maximum(row, 0) % L, tl.cast(B, tl.int64) * D
    f = known_row(carry, at, b, B, D, lanes, lanes < tl.where(row > low, D, 0), WIDE)
    h = known_row(carry + L * size, at, b, B, D, lanes, lanes < tl.where(row >= low, D, 0), WIDE)
    return n, tl.where(row > low, f, n), tl.where(row >= low, h, e), e


@triton.jit(do_not_specialize=["T", "A", "column", "anchor", "previous_start", "start", "stop"])
def draft_scan_kernel(
    states, predictions, drift, draft_output, draft_cache, correction, weights, slope, state_coef, model_coef,
    lo, hi, carry, z, remainder, secant_weights, dots, partials, T, A, B, D, column, anchor, previous_start, start,
    stop, L: tl.constexpr, DRIFT: tl.constexpr, SPECTRAL: tl.constexpr, ROLLOUT: tl.constexpr, RING: tl.constexpr,
    P: tl.constexpr, MAX_OUTPUT: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of D, one sample. dots: (2, B, blocks, P), that of anchor n in n % 2. partials: (T, B, blocks, 3):
    |N - X|^2, |F - X|^2, |N|^2. The rest: see `draft_scan`."""
    WIDE: tl.constexpr = tl.float64 if states.dtype.element_ty == tl.float64 else tl.float32
    S: tl.constexpr = RING - 1
    blocks = tl.cdiv(D, BLOCK)
    block, b = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    low, high = window(lo, hi, b, T)
    lanes, slots = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, P)
    mask = lanes < D
    inside = (start >= low) & (start < high)
    asked, there = lanes < tl.where(inside, D, 0), lanes < tl.where(start < high, D, 0)
    now = known_row(states, start, b, B, D, lanes, there, WIDE)
    c = slope_row(slope, start, D, lanes, mask, SPECTRAL, WIDE)
    sanitized = tl.load(draft_output + tl.cast(b, tl.int64) * D + lanes, mask=asked, other=0.0).to(WIDE)
    sanitized = tl.where(tl.abs(sanitized) < MAX_OUTPUT, sanitized, c * now)
    own = known_row(draft_cache, anchor, b, B, D, lanes, asked, WIDE)
    kept = tl.load(own_column(z, anchor, b, B, D, A, column) + lanes, mask=asked, other=0.0).to(WIDE)
    if ROLLOUT:
        before_low = known_row(predictions, start, b, B, D, lanes, lanes < tl.where(start < low, D, 0), WIDE)
        change = tl.where(inside, sanitized, before_low) - c * now
    else:
        change = sanitized - own - c * (now - kept)
        if RING > 1:
            pair = tl.cast(anchor, tl.int64) * B + b
            use = slots < tl.where(inside, S, 0)
            square = use[:, None] & use[None, :]
            table = secant_weights + pair * (S * S)
            fit = tl.load(table + slots[:, None] * S + slots[None, :], mask=square, other=0.0)
            bound = tl.where(tl.load(table + slots * (S + 1), mask=use, other=0.0) != 0, D, 0)
            span, total = tl.arange(0, SPAN), tl.zeros((P,), tl.float64)
            known = tl.where(start > low, bound, 0) > 0  # row low starts from its own state
            for first_block in tl.range(0, blocks, SPAN):
                here = first_block + span
                part = dots + (((anchor % 2) * B + b).to(tl.int64) * blocks + here)[:, None] * P + slots[None, :]
                wanted = (here < blocks)[:, None] & known[None, :]
                total += tl.sum(tl.load(part, mask=wanted, other=0.0).to(tl.float64), axis=0)
            gamma = tl.sum(fit * total[None, :], axis=1)
            gamma = tl.where(tl.abs(gamma) < float("inf"), gamma, 0.0).to(WIDE)[:, None]
            mine = tl.load(own_column(remainder, anchor, b, B, D, A, column) + lanes, mask=asked, other=0.0).to(WIDE)
            past = older_columns(remainder, anchor, b, B, D, A, column, lanes, bound, RING, P, WIDE)
            change += tl.sum(tl.where(lanes[None, :] < bound[:, None], gamma * (past - mine[None, :]), 0.0), axis=0)
        change = tl.where(inside & (start > low), change, 0.0)  # at row low the model's own prediction stands
    cached = draft_cache + (tl.cast(anchor, tl.int64) * B + b) * D + lanes
    tl.store(cached, sanitized.to(draft_cache.dtype.element_ty), mask=asked)
    rounded = change.to(correction.dtype.element_ty)
    tl.store(correction + ((anchor % 2) * B + b).to(tl.int64) * D + lanes, rounded, mask=there)
    first, last = tl.maximum(start, low), tl.minimum(stop, high)
    if first >= last:
        return
    change = rounded.to(WIDE)
    near = lanes < tl.where(previous_start >= (0 if ROLLOUT else low), D, 0)
    other = tl.load(correction + (((anchor + 1) % 2) * B + b).to(tl.int64) * D + lanes, mask=near, other=0.0).to(WIDE)
    n0, p0, _, _ = lagged(states, predictions, carry, first, low, b, B, D, lanes, mask, L, WIDE)
    n1, n2, n3, p1, p2, p3, h1, h2, h3, e1, e2, e3 = n0, n0, n0, n0, n0, n0, n0, n0, n0, n0, n0, n0
    if L > 1:
        n1, p1, h1, e1 = lagged(states, predictions, carry, first - 1, low, b, B, D, lanes, mask, L, WIDE)
    if L > 2:
        n2, p2, h2, e2 = lagged(states, predictions, carry, first - 2, low, b, B, D, lanes, mask, L, WIDE)
    if L > 3:
        n3, p3, h3, e3 = lagged(states, predictions, carry, first - 3, low, b, B, D, lanes, mask, L, WIDE)
    x = tl.where(start > low, kept, n0)
    for i in tl.range(first, last):
        old = known_row(states, i + 1, b, B, D, lanes, mask, WIDE)
        noise = drift_row(drift, i, b, B, D, lanes, mask, DRIFT, WIDE)
        c = slope_row(slope, i, D, lanes, mask, SPECTRAL, WIDE)
        extra = tl.load(weights + 2 * i).to(WIDE) * other + tl.load(weights + 2 * i + 1).to(WIDE) * change
        e0 = n0
        if ROLLOUT:
            h0 = tl.fma(c, n0, extra)
        else:
            e0 = known_row(predictions, i, b, B, D, lanes, mask, WIDE)
            h0 = tl.fma(c, n0 - x, e0) + extra
        new = combined(i, n0, n1, n2, n3, h0, h1, h2, h3, state_coef, model_coef, L, WIDE) + noise
        plain = combined(i, p0, p1, p2, p3, e0, e1, e2, e3, state_coef, model_coef, L, WIDE) + noise
        stored = new.to(states.dtype.element_ty)
        tl.store(states + (tl.cast(i + 1, tl.int64) * B + b) * D + lanes, stored, mask=mask)
        if L > 1:
            tl.store(own_column(carry, i + 1, b, B, D, L, 0) + lanes, plain, mask=mask)
            tl.store(own_column(carry, i, b, B, D, L, 1) + lanes, h0, mask=mask)
        if not ROLLOUT:
            sums = partials + ((tl.cast(i, tl.int64) * B + b) * blocks + block) * 3
            tl.store(sums, tl.sum((new - old) * (new - old)))
            tl.store(sums + 1, tl.sum((plain - old) * (plain - old)))
            tl.store(sums + 2, tl.sum(new * new))
        if L > 3:
            n3, p3, h3, e3 = n2, p2, h2, e2
        if L > 2:
            n2, p2, h2, e2 = n1, p1, h1, e1
        if L > 1:
            n1, p1, h1, e1 = n0, p0, h0, e0
        n0, p0, x = stored.to(WIDE), plain, old
    if L == 1:
        tl.store(own_column(carry, last, b, B, D, L, 0) + lanes, p0, mask=mask)
    if RING > 1 and not ROLLOUT:  # noqa: SIM102 (one is known when the kernel is compiled, the other is not)
        if (last == stop) & (anchor + 1 < A):
            pair = tl.cast(anchor + 1, tl.int64) * B + b
            use = slots < tl.where(stop < high, S, 0)
            table = secant_weights + pair * (S * S)
            bound = tl.where(tl.load(table + slots * (S + 1), mask=use, other=0.0) != 0, D, 0)
            past = older_columns(z, anchor + 1, b, B, D, A, column, lanes, bound, RING, P, WIDE)
            dz = tl.where(lanes[None, :] < bound[:, None], past - x[None, :], 0.0)
            part = dots + ((((anchor + 1) % 2) * B + b).to(tl.int64) * blocks + block) * P
            tl.store(part + slots, tl.sum(dz * (n0 - x)[None, :], axis=1))


def launch(
    states: Tensor, predictions: Tensor, draft_output: Tensor | None, draft_cache: Tensor, correction: Tensor,
    weights: Tensor, state_coef: Tensor, model_coef: Tensor, slope: Tensor, lo: Tensor, hi: Tensor,
    sq_diff: Tensor, sq_norm: Tensor, carry: Tensor, z: Tensor, remainder: Tensor, secant_weights: Tensor, column: int,
    anchor: int, previous_start: int, start: int, stop: int, rollout: bool, last: bool, drift: Tensor | None,
    workspace: Tensor | None,
) -> None:  # fmt: skip
    """The op on contiguous tensors: one launch, and after the last segment one that adds up the norms."""
    if workspace is None:
        raise ValueError("workspace: expected one of draft_scan_bytes(...) for the Triton kernels, got None")
    (steps, batch, size), device, lags, ring = predictions.shape, states.device, state_coef.shape[1], z.shape[0]
    config = _config.config("draft_scan", device)
    scratch = cut(layout(ProblemSize(steps, batch, size, lags, states.dtype, device), ring), workspace, device)
    dots, partials = scratch["dots"], scratch["partials"]
    draft_scan_kernel[(dots.shape[2] * batch,)](
        states, predictions, drift, draft_cache if draft_output is None else draft_output, draft_cache, correction,
        weights, slope, state_coef, model_coef, lo, hi, carry, z, remainder, secant_weights, dots, partials,
        steps, draft_cache.shape[0], batch, size, column, anchor, previous_start, start, stop, L=lags,
        DRIFT=drift is not None, SPECTRAL=slope.shape[1] > 1, ROLLOUT=rollout, RING=ring, P=dots.shape[3],
        MAX_OUTPUT=MAX_OUTPUT, SPAN=32, BLOCK=config.block(states.element_size()), num_warps=config.num_warps,
        enable_fp_fusion=True,
    )  # fmt: skip
    if last and not rollout:
        launch_norms(partials, lo, hi, sq_diff, sq_norm, steps)
