"""Triton kernels of what a round with a draft remembers: two launches before a pass along the chain.

1. `draft_gram_kernel`: X and E - made of every anchor go into this round's ring columns, and the Gram of the secants
   dz_k = z_k - X is taken, with |X|^2, per block of D. Bytes: E, X, made and H columns of z in, a column of z and of
   the rest out, H + 5 elements per element of an anchor's state.
2. `draft_weights_kernel`: sums over blocks in a fixed order, and the inverse of every anchor's system in float64
   (newton_scan/_triton_prepare.py: the same fit).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import _config
from .._workspace import Size, cut, next_power_of_2
from ..ddim_update._triton import known_row
from ..newton_scan._triton_prepare import older_columns, own_column, secant_weights
from ._layout import layout


@triton.jit
def active(lo, hi, b, row):
    """Whether sample b solves for that row."""
    return (tl.load(lo + b) <= row) & (row < tl.load(hi + b))


@triton.jit(do_not_specialize=["A", "column"])
def draft_gram_kernel(
    states, predictions, made, at, lo, hi, z, rest, filled, partials, A, B, D, column, RING: tl.constexpr,
    P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of D, one anchor of one sample. partials (A, B, blocks, P * P + 1): Gram, |X|^2."""
    WIDE: tl.constexpr = tl.float64 if states.dtype.element_ty == tl.float64 else tl.float32
    blocks = tl.cdiv(D, BLOCK)
    block, rest_of_id = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    b, n = rest_of_id % B, rest_of_id // B
    row = tl.load(at + n)
    if not active(lo, hi, b, row):
        return
    lanes, slots = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, P)
    mask = lanes < D
    x = known_row(states, row, b, B, D, lanes, mask, WIDE)
    beyond = known_row(predictions, row, b, B, D, lanes, mask, WIDE) - known_row(made, n, b, B, D, lanes, mask, WIDE)
    bound = tl.where(slots < tl.minimum(tl.load(filled + n * B + b), RING - 1), D, 0)
    past = older_columns(z, n, b, B, D, A, column, lanes, bound, RING, P, WIDE)
    dz = tl.where(lanes[None, :] < bound[:, None], past - x[None, :], 0.0)
    tl.store(own_column(z, n, b, B, D, A, column) + lanes, x.to(z.dtype.element_ty), mask=mask)
    tl.store(own_column(rest, n, b, B, D, A, column) + lanes, beyond.to(rest.dtype.element_ty), mask=mask)
    sums = partials + ((tl.cast(n, tl.int64) * B + b) * blocks + block) * (P * P + 1)
    for k in tl.static_range(RING - 1):
        dz_k = tl.sum(tl.where(slots[:, None] == k, dz, 0.0), axis=0)
        tl.store(sums + k * P + slots, tl.sum(dz * dz_k[None, :], axis=1))
    tl.store(sums + P * P, tl.sum(x * x))


@triton.jit(do_not_specialize=["blocks"])
def draft_weights_kernel(
    partials, at, lo, hi, filled, weights, B, blocks, ridge: tl.float64, floor: tl.float64, RING: tl.constexpr,
    P: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """One anchor of one sample. weights: (A, B, RING - 1, RING - 1) float64."""
    b, n = tl.program_id(0) % B, tl.program_id(0) // B
    if not active(lo, hi, b, tl.load(at + n)):
        return
    pair, slots, span = tl.cast(n, tl.int64) * B + b, tl.arange(0, P), tl.arange(0, SPAN)
    count = tl.minimum(tl.maximum(tl.load(filled + pair), 0), RING - 1)
    known = slots < count
    gram, norm = tl.zeros((P, P), tl.float64), tl.zeros((SPAN,), tl.float64)
    for start in tl.range(0, blocks, SPAN):
        here = start + span < blocks
        sums = partials + (pair * blocks + start + span) * (P * P + 1)
        tile = sums[:, None, None] + slots[None, :, None] * P + slots[None, None, :]
        wanted = here[:, None, None] & known[None, :, None] & known[None, None, :]
        gram += tl.sum(tl.load(tile, mask=wanted, other=0.0).to(tl.float64), axis=0)
        norm += tl.load(sums + P * P, mask=here, other=0.0).to(tl.float64)
    solved = secant_weights(gram, tl.sum(norm), known, ridge, floor, P)
    S: tl.constexpr = RING - 1
    inside = (slots < S)[:, None] & (slots < S)[None, :]
    tl.store(weights + pair * (S * S) + slots[:, None] * S + slots[None, :], solved, mask=inside)
    tl.store(filled + pair, count + 1)


def launch(
    states: Tensor, predictions: Tensor, made: Tensor, at: Tensor, lo: Tensor, hi: Tensor, z: Tensor, rest: Tensor,
    filled: Tensor, weights: Tensor, column: int, ridge: float, floor: float, workspace: Tensor | None = None,
) -> None:  # fmt: skip
    """The op on contiguous tensors."""
    (count, batch, size), device, ring = made.shape, states.device, z.shape[0]
    config = _config.config("draft_secants", device)
    partials = cut(layout(Size(count, batch, size, 1, states.dtype, device), ring), workspace, device)["partials"]
    blocks, pairs = partials.shape[2], next_power_of_2(max(ring - 1, 1))
    draft_gram_kernel[(blocks * batch * count,)](
        states, predictions, made, at, lo, hi, z, rest, filled, partials, count, batch, size, column, RING=ring,
        P=pairs, BLOCK=config.block(states.element_size()), num_warps=config.num_warps, enable_fp_fusion=True,
    )  # fmt: skip
    draft_weights_kernel[(batch * count,)](
        partials, at, lo, hi, filled, weights, batch, blocks, ridge, floor, RING=ring, P=pairs, SPAN=8, num_warps=1,
        enable_fp_fusion=True,
    )  # fmt: skip
