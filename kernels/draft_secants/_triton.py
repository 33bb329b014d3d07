"""Triton kernels of the history of a solve with a draft: two launches before a sweep along the chain.

1. `draft_gram_kernel`: X and E - draft_cache of every anchor go into this round's ring columns, and the Gram of the
   secants dz_k = z_k - X is taken, with |X|^2, per block of D. Bytes: E, X, draft_cache and H columns of z in, a column
   of z and of the remainder out, H + 5 elements per element of an anchor's state.
2. `draft_weights_kernel`: sums over blocks in a fixed order, and the inverse of every anchor's system in float64
   (newton_scan/_triton_prepare.py: the same fit).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import _config
from .._triton_rows import known_row, older_columns, own_column
from .._workspace import ProblemSize, cut, next_power_of_2
from ..newton_scan._triton_prepare import gram_sums, secant_fit
from . import layout


@triton.jit
def active(lo, hi, b, row):
    """Whether sample b solves for that row."""
    return (tl.load(lo + b) <= row) & (row < tl.load(hi + b))


@triton.jit(do_not_specialize=["A", "column"])
def draft_gram_kernel(
    states, predictions, draft_cache, anchor_rows, lo, hi, z, remainder, filled, partials, A, B, D, column,
    RING: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of D, one anchor of one sample. partials (A, B, blocks, P * P + 1): Gram, |X|^2."""
    WIDE: tl.constexpr = tl.float64 if states.dtype.element_ty == tl.float64 else tl.float32
    blocks = tl.cdiv(D, BLOCK)
    block, rest_of_id = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    b, n = rest_of_id % B, rest_of_id // B
    row = tl.load(anchor_rows + n)
    if not active(lo, hi, b, row):
        return
    lanes, slots = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, P)
    mask = lanes < D
    x = known_row(states, row, b, B, D, lanes, mask, WIDE)
    own = known_row(predictions, row, b, B, D, lanes, mask, WIDE)
    own -= known_row(draft_cache, n, b, B, D, lanes, mask, WIDE)
    bound = tl.where(slots < tl.minimum(tl.load(filled + n * B + b), RING - 1), D, 0)
    past = older_columns(z, n, b, B, D, A, column, lanes, bound, RING, P, WIDE)
    dz = tl.where(lanes[None, :] < bound[:, None], past - x[None, :], 0.0)
    tl.store(own_column(z, n, b, B, D, A, column) + lanes, x.to(z.dtype.element_ty), mask=mask)
    tl.store(own_column(remainder, n, b, B, D, A, column) + lanes, own.to(remainder.dtype.element_ty), mask=mask)
    sums = partials + ((tl.cast(n, tl.int64) * B + b) * blocks + block) * (P * P + 1)
    for k in tl.static_range(RING - 1):
        dz_k = tl.sum(tl.where(slots[:, None] == k, dz, 0.0), axis=0)
        tl.store(sums + k * P + slots, tl.sum(dz * dz_k[None, :], axis=1))
    tl.store(sums + P * P, tl.sum(x * x))


@triton.jit(do_not_specialize=["blocks"])
def draft_weights_kernel(
    partials, anchor_rows, lo, hi, filled, secant_weights, B, blocks, ridge: tl.float64, floor: tl.float64,
    RING: tl.constexpr, P: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """One anchor of one sample. secant_weights: (A, B, RING - 1, RING - 1) float64."""
    b, n = tl.program_id(0) % B, tl.program_id(0) // B
    if not active(lo, hi, b, tl.load(anchor_rows + n)):
        return
    pair, slots = tl.cast(n, tl.int64) * B + b, tl.arange(0, P)
    count = tl.minimum(tl.maximum(tl.load(filled + pair), 0), RING - 1)
    known = slots < count
    gram, norm, _ = gram_sums(partials, pair, blocks, known, P * P + 1, P, SPAN)
    solved = secant_fit(gram, norm, known, ridge, floor, P)
    S: tl.constexpr = RING - 1
    inside = (slots < S)[:, None] & (slots < S)[None, :]
    tl.store(secant_weights + pair * (S * S) + slots[:, None] * S + slots[None, :], solved, mask=inside)
    tl.store(filled + pair, count + 1)


def launch(
    states: Tensor, predictions: Tensor, draft_cache: Tensor, anchor_rows: Tensor, lo: Tensor, hi: Tensor, z: Tensor,
    remainder: Tensor, filled: Tensor, secant_weights: Tensor, column: int, ridge: float, floor: float,
    workspace: Tensor | None,
) -> None:  # fmt: skip
    """The op on contiguous tensors."""
    (count, batch, size), device, ring = draft_cache.shape, states.device, z.shape[0]
    config = _config.config("draft_gram", device)
    partials = cut(layout(ProblemSize(count, batch, size, 1, states.dtype, device), ring), workspace, device)[
        "partials"
    ]
    blocks, pairs = partials.shape[2], next_power_of_2(max(ring - 1, 1))
    draft_gram_kernel[(blocks * batch * count,)](
        states, predictions, draft_cache, anchor_rows, lo, hi, z, remainder, filled, partials, count, batch, size,
        column, RING=ring, P=pairs, BLOCK=config.block(states.element_size()), num_warps=config.num_warps,
        enable_fp_fusion=True,
    )  # fmt: skip
    draft_weights_kernel[(batch * count,)](
        partials, anchor_rows, lo, hi, filled, secant_weights, batch, blocks, ridge, floor, RING=ring, P=pairs,
        SPAN=8, num_warps=1, enable_fp_fusion=True,
    )  # fmt: skip
