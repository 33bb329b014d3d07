"""Triton kernel of the fit of secants: one launch, one program a row; H^2 numbers in and out. Formula: reference.py.

One kernel in the place of some forty operations on as few numbers, among them a batched inverse, which torch makes row
by row. Fang and Saad 2009, doi 10.1002/nla.617.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .._launches import launcher
from ..newton_scan._triton_prepare import inverse


@triton.jit(do_not_specialize=["R"])
def secant_fit_kernel(
    fit, gram, size, count, ridges, guess_error, R, floor: tl.float64, guessed: tl.float64,
    nonlinear: tl.float64, H: tl.constexpr, P: tl.constexpr, GUESSED: tl.constexpr,
):  # fmt: skip
    """One row; P >= H columns, of which those from H on are none."""
    row, slots = tl.program_id(0), tl.arange(0, P)
    eye = slots[:, None] == slots[None, :]
    known = (slots < H) & (slots + 1 < tl.load(count + row))
    at = tl.cast(row, tl.int64) * (H * H) + slots[:, None] * H + slots[None, :]
    inside = (slots < H)[:, None] & (slots < H)[None, :]
    products = tl.load(gram + at, mask=inside, other=0.0).to(tl.float64)
    length = tl.sqrt(tl.sum(tl.where(eye, products, 0.0), axis=1))
    least = tl.full((), floor, tl.float64) * tl.load(size + row).to(tl.float64)
    keep = known & (length > least) & (length < float("inf"))
    ridge = tl.load(ridges + tl.cast(slots, tl.int64) * R + row, mask=slots < H, other=1.0).to(tl.float64)
    if GUESSED:
        error = tl.load(guess_error + row).to(tl.float64)
        moved = tl.full((), nonlinear, tl.float64) * tl.where(keep, length, 1.0)
        error = error / moved
        more = error * error
        wanted = (ridge > tl.full((), guessed, tl.float64)) & ((more > ridge) | (more != more))
        ridge = tl.where(wanted, more, ridge)
    scale = tl.where(keep, 1.0 / tl.where(keep, length, 1.0), 0.0)
    both = scale[:, None] * scale[None, :]
    finite = tl.abs(products) < float("inf")
    system = tl.where(finite & (both > 0), products * both, 0.0)
    system += tl.where(eye, tl.where(keep, ridge, 1.0)[:, None], 0.0)
    tl.store(fit + at, inverse(system, P) * both, mask=inside)


def launch(
    fit: Tensor, gram: Tensor, size: Tensor, count: Tensor, ridges: Tensor, guess_error: Tensor | None, floor: float,
    guessed: float, nonlinear: float,
) -> None:  # fmt: skip
    """The op on contiguous tensors: one launch."""
    rows, columns, _ = gram.shape
    if rows:
        launcher(secant_fit_kernel, (rows,))(
            fit, gram, size, count, ridges, guess_error, rows, floor, guessed, nonlinear, H=columns,
            P=triton.next_power_of_2(columns), GUESSED=guess_error is not None, num_warps=1, enable_fp_fusion=True,
        )  # fmt: skip
