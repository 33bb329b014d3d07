"""Triton kernels of the inverse scan: two launches, none of which the host waits for.

N[i] = X[i] + dX gamma + damping (rho - dG gamma) / d, rho = N[i+1] - G[i], gamma = argmin |rho - dG gamma|: multisecant
steps of the second kind (Fang and Saad 2009, doi 10.1002/nla.617, equation 24), from the last row to the first.

1. `inverse_prepare_kernel`: what does not depend on N, rows and blocks of D in parallel: the Gram of dG and what the
   row misses; this round's states and predictions go into their ring column. Bytes: 2 H + 5 elements per state element.
2. `inverse_advance_kernel`: one program per sample. A row takes two passes over D, the dots with rho and the step; a
   step that was too long is made again. Bytes: 2 H + 3 elements in the first and 2 H + 4 in the second pass, from the
   cache where a row of the rings fits.

Sums are taken in a fixed order: the same bits every time. Arithmetic is float32, or float64 if the states are or where
there are more than 8 columns: the long histories of stiff rows, whose columns are nearly dependent.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import _config
from .._launches import launcher
from .._triton_rows import combined, drift_row, earlier_rows, known_row, older_columns, own_column, slope_row, window
from .._workspace import ProblemSize, cut, next_power_of_2
from ..newton_scan._triton_prepare import gram_sums, secant_fit
from . import layout


@triton.jit
def active(lo, hi, b, T, W):
    """The active rows of sample b, clamped into the chain and the rings."""
    first, last = window(lo, hi, b, T)
    return tl.maximum(first, last - W), last


@triton.jit
def reached_row(
    i, b, B, D, lanes, mask, x, states, predictions, drift, state_coef, model_coef, L: tl.constexpr,
    DRIFT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Row i's prediction, and where the step leads from its state x."""
    out = known_row(predictions, i, b, B, D, lanes, mask, WIDE)
    x1, x2, x3 = earlier_rows(states, i, x, b, B, D, lanes, mask, L, WIDE)
    e1, e2, e3 = earlier_rows(predictions, i, x, b, B, D, lanes, mask, L, WIDE)
    reached = combined(i, x, x1, x2, x3, out, e1, e2, e3, state_coef, model_coef, L, WIDE)
    return out, reached + drift_row(drift, i, b, B, D, lanes, mask, DRIFT, WIDE)


@triton.jit
def differences(
    i, b, B, D, W, column, lanes, bound, x, out, z, e, first, model, RING: tl.constexpr, P: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """dX and dG = first dX + model dE (P, lanes) of row i; zero where lanes >= bound (P,)."""
    here = lanes[None, :] < bound[:, None]
    dx = older_columns(z, i, b, B, D, W, column, lanes, bound, RING, P, WIDE) - x[None, :]
    de = older_columns(e, i, b, B, D, W, column, lanes, bound, RING, P, WIDE) - out[None, :]
    return tl.where(here, dx, 0.0), tl.where(here, tl.fma(dx, first, de * model), 0.0)


@triton.jit(do_not_specialize=["T", "W", "column"])
def inverse_prepare_kernel(
    states, predictions, drift, weight, state_coef, model_coef, lo, hi, z, e, filled, partials, T, B, D, W, column,
    L: tl.constexpr, DRIFT: tl.constexpr, WEIGHTED: tl.constexpr, RING: tl.constexpr, P: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of D of one row of one sample. partials: (W, B, blocks, P * P + 1): the Gram, and what the row misses.

    WEIGHTED: a weight for every element.
    """
    WIDE: tl.constexpr = partials.dtype.element_ty
    blocks = tl.cdiv(D, BLOCK)
    block, rest = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    b = rest % B
    begin, end = active(lo, hi, b, T, W)
    i = end - 1 - rest // B
    if i < begin:
        return
    lanes = block * BLOCK + tl.arange(0, BLOCK)
    mask, slots, row = lanes < D, tl.arange(0, P), tl.cast((i % W) * B + b, tl.int64)
    x = known_row(states, i, b, B, D, lanes, mask, WIDE)
    after = known_row(states, i + 1, b, B, D, lanes, mask, WIDE)
    out, reached = reached_row(
        i, b, B, D, lanes, mask, x, states, predictions, drift, state_coef, model_coef, L, DRIFT, WIDE
    )
    missed = slope_row(weight, i, D, lanes, mask, WEIGHTED, WIDE) * (after - reached)
    bound = tl.where(slots < tl.load(filled + row), tl.where(slots < RING - 1, D, 0), 0)
    a, c = tl.load(state_coef + i * L).to(WIDE), tl.load(model_coef + i * L).to(WIDE)
    _, dg = differences(i, b, B, D, W, column, lanes, bound, x, out, z, e, a, c, RING, P, WIDE)
    tl.store(own_column(z, i, b, B, D, W, column) + lanes, x.to(z.dtype.element_ty), mask=mask)
    tl.store(own_column(e, i, b, B, D, W, column) + lanes, out.to(e.dtype.element_ty), mask=mask)
    sums = partials + (row * blocks + block) * (P * P + 1)
    for k in tl.range(0, RING - 1):
        dg_k = tl.sum(tl.where(slots[:, None] == k, dg, 0.0), axis=0)
        tl.store(sums + k * P + slots, tl.sum(dg * dg_k[None, :], axis=1))
    tl.store(sums + P * P, tl.sum(missed * missed))


@triton.jit(do_not_specialize=["T", "W", "column"])
def inverse_advance_kernel(
    states, predictions, drift, slope, state_coef, model_coef, lo, hi, sq_miss, z, e, filled, partials, blocks, T, B, D,
    W, column, damping: tl.float64, ridge: tl.float64, stale: tl.float64, floor: tl.float64, reach: tl.float64,
    L: tl.constexpr, DRIFT: tl.constexpr, SPECTRAL: tl.constexpr, RING: tl.constexpr, P: tl.constexpr,
    SPAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One sample, all its rows. X is read from this round's ring column, so that no state is read where it is written.

    A row reads the state that the row before it in the scan wrote: the barrier after a row makes it visible.
    """
    WIDE: tl.constexpr = partials.dtype.element_ty
    b = tl.program_id(0)
    begin, end = active(lo, hi, b, T, W)
    slots = tl.arange(0, P)
    eye = slots[:, None] == slots[None, :]
    for k in tl.range(0, end - begin):
        i = end - 1 - k
        row = tl.cast((i % W) * B + b, tl.int64)
        count = tl.minimum(tl.maximum(tl.load(filled + row), 0), RING - 1)
        bound = tl.where(slots < count, D, 0)
        a, c = tl.load(state_coef + i * L).to(WIDE), tl.load(model_coef + i * L).to(WIDE)
        old, kept = own_column(z, i, b, B, D, W, column), states + (tl.cast(i, tl.int64) * B + b) * D
        products, rhos = tl.zeros((P, BLOCK), WIDE), tl.zeros((BLOCK,), WIDE)
        sizes, ends, starts = rhos, rhos, rhos
        for start in tl.range(0, D, BLOCK):
            lanes = start + tl.arange(0, BLOCK)
            mask = lanes < D
            x = tl.load(old + lanes, mask=mask, other=0.0).to(WIDE)
            after = known_row(states, i + 1, b, B, D, lanes, mask, WIDE)
            out, reached = reached_row(
                i, b, B, D, lanes, mask, x, states, predictions, drift, state_coef, model_coef, L, DRIFT, WIDE
            )
            _, dg = differences(i, b, B, D, W, column, lanes, bound, x, out, z, e, a, c, RING, P, WIDE)
            rho = after - reached
            products += dg * rho[None, :]
            rhos += rho * rho
            sizes += reached * reached
            ends += after * after
            starts += x * x
        gram, miss, _ = gram_sums(partials, row, blocks, slots < count, P * P + 1, P, SPAN)
        far = tl.full((), stale, tl.float64) * tl.sqrt(tl.sum(rhos).to(tl.float64))  # longer: slopes of far away
        near = tl.sqrt(tl.sum(tl.where(eye, gram, 0.0), axis=1)) <= far
        fit = secant_fit(gram, tl.sum(sizes).to(tl.float64), (slots < count) & near, ridge, floor, P)
        gamma = tl.sum(fit * tl.sum(products, axis=1).to(tl.float64)[None, :], axis=1)
        gamma = tl.where(tl.abs(gamma) < float("inf"), gamma, 0.0).to(WIDE)[:, None]
        limit = tl.full((), reach, tl.float64) * tl.sqrt(tl.maximum(tl.sum(starts), tl.sum(ends)).to(tl.float64))
        part, size = tl.full((), 1.0, tl.float64), D
        for _ in tl.range(0, 2):  # the second time nothing, but where the step is longer than its limit, or not finite
            steps = tl.zeros((BLOCK,), WIDE)
            for start in tl.range(0, size, BLOCK):
                lanes = start + tl.arange(0, BLOCK)
                mask = lanes < D
                x = tl.load(old + lanes, mask=mask, other=0.0).to(WIDE)
                after = known_row(states, i + 1, b, B, D, lanes, mask, WIDE)
                out, reached = reached_row(
                    i, b, B, D, lanes, mask, x, states, predictions, drift, state_coef, model_coef, L, DRIFT, WIDE
                )
                dx, dg = differences(i, b, B, D, W, column, lanes, bound, x, out, z, e, a, c, RING, P, WIDE)
                rest = (after - reached - tl.sum(gamma * dg, axis=0)) * tl.full((), damping, WIDE)
                rest /= tl.fma(slope_row(slope, i, D, lanes, mask, SPECTRAL, WIDE), c, a)
                step = tl.where(mask, tl.sum(gamma * dx, axis=0) + rest, 0.0)
                steps += step * step
                new = tl.where(part > 0, tl.fma(step, part.to(WIDE), x), x)
                tl.store(kept + lanes, new.to(states.dtype.element_ty), mask=mask)
            tl.debug_barrier()
            length = tl.sqrt(tl.sum(steps).to(tl.float64))
            size = tl.where(length <= limit, 0, D)
            part = tl.where(length < float("inf"), limit / tl.where(length > limit, length, 1.0), 0.0)
        tl.store(sq_miss + tl.cast(i, tl.int64) * B + b, miss.to(sq_miss.dtype.element_ty))
        tl.store(filled + row, count + 1)


def launch(
    states: Tensor, predictions: Tensor, state_coef: Tensor, model_coef: Tensor, slope: Tensor, weight: Tensor,
    lo: Tensor, hi: Tensor, sq_miss: Tensor, z: Tensor, e: Tensor, filled: Tensor, column: int, damping: float,
    ridge: float, stale: float, floor: float, reach: float, drift: Tensor | None, workspace: Tensor | None = None,
) -> None:  # fmt: skip
    """The op on contiguous tensors: two launches."""
    (steps, batch, numel), device, (ring, width) = predictions.shape, states.device, z.shape[:2]
    size = ProblemSize(steps, batch, numel, state_coef.shape[1], states.dtype, device)
    partials = cut(layout(size, ring, width), workspace, device)["partials"]
    blocks, pairs, item = partials.shape[2], next_power_of_2(ring - 1), partials.element_size()
    prepare, advance = _config.config("inverse_prepare", device), _config.config("inverse_advance", device)
    many = max(1, pairs // 8)  # columns beyond those of short histories share out the registers
    shape = {"L": size.lags, "DRIFT": drift is not None, "RING": ring, "P": pairs, "enable_fp_fusion": True}
    launcher(inverse_prepare_kernel, (blocks * batch * min(steps, width),))(
        states, predictions, drift, weight, state_coef, model_coef, lo, hi, z, e, filled, partials, steps, batch, numel,
        width, column, WEIGHTED=weight.shape[1] > 1, BLOCK=prepare.block(states.element_size()),
        num_warps=prepare.num_warps * many, **shape,
    )  # fmt: skip
    span = advance.block(states.element_size() if pairs < 8 else item) // many
    launcher(inverse_advance_kernel, (batch,))(
        states, predictions, drift, slope, state_coef, model_coef, lo, hi, sq_miss, z, e, filled, partials, blocks,
        steps, batch, numel, width, column, damping, ridge, stale, floor, reach, SPECTRAL=slope.shape[1] > 1,
        SPAN=max(1, 8 // many**2), BLOCK=span, num_warps=advance.num_warps, num_stages=1, **shape,
    )  # fmt: skip
