"""Triton kernel of the copy of rows between device-held bounds: one launch, programs outside of the bounds leave.

Bytes: one element read and one written for each element of the rows copied.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import _config
from .._launches import launcher


@triton.jit(do_not_specialize=["R", "S"])
def copy_rows_kernel(target, source, first, last, R, B, D, S, BLOCK: tl.constexpr):
    """One block of D, one row, one sample."""
    blocks = tl.cdiv(D, BLOCK)
    block, rest = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    b, i = rest % B, rest // B
    if (i < tl.load(first + b)) | (i >= tl.load(last + b)):
        return
    lanes = block * BLOCK + tl.arange(0, BLOCK)
    mask = lanes < D
    value = tl.load(source + (tl.cast(i % S, tl.int64) * B + b) * D + lanes, mask=mask)
    tl.store(target + (tl.cast(i, tl.int64) * B + b) * D + lanes, value.to(target.dtype.element_ty), mask=mask)


def launch(target: Tensor, source: Tensor, first: Tensor, last: Tensor) -> None:
    """The op on contiguous tensors: one launch."""
    rows, batch, size = target.shape
    config = _config.config("copy_rows", target.device)
    block = config.block(target.element_size())
    launcher(copy_rows_kernel, (triton.cdiv(size, block) * batch * rows,))(
        target, source, first, last, rows, batch, size, source.shape[0], BLOCK=block, num_warps=config.num_warps
    )
