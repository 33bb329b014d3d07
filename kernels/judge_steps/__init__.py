"""The verdict on a round's steps: which rows are final, by what they have left to go."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _dispatch
from .reference import FASTEST, FIRST, SLOWEST
from .reference import judge_steps as _reference

__all__ = ["FASTEST", "FIRST", "SLOWEST", "judge_steps"]

_SCHEMA = "(Tensor(a!) sq_diff, Tensor sq_norm, Tensor(b!) previous, Tensor strict, float freeze, float floor) -> ()"


def judge_steps(
    sq_diff: Tensor,
    sq_norm: Tensor,
    previous: Tensor,
    strict: Tensor,
    freeze: float,
    floor: float,
    *,
    backend: str = "auto",
) -> None:
    """Bring sq_diff / sq_norm to at most freeze^2 where a row is final, and above it where it is not, in place.

    A row that moved by r in this round and by p in the one before, relative to its size, contracts by rho = r / p and
    has r rho / (1 - rho) left to go (Aitken's extrapolation); rho is kept between 0.1 and 0.9, and is 0.5 where p is
    NaN. It is final when that is at most freeze * strict, or r at most `floor`, the rounding. Where a row is not final
    and r is above 2 freeze, and where r is not finite, sq_diff stays as it is.

    Args:
        sq_diff, sq_norm: (T, B) float32 or float64, squared step and size.
        previous: (T, B), r^2 of the round before, NaN where there is none; replaced by this round's.
        strict: (B,), how much tighter a sample's rows are held.
        backend: as for `ddim_update`; the C++ form is of dense float64 on the CPU, and is left to the reference where
            the numbers are others.

    Raises:
        ValueError: an argument has the wrong shape or dtype. BackendUnavailableError: as for `ddim_update`.
    """
    for name, tensor, shape in (
        ("sq_diff", sq_diff, (*sq_diff.shape[:1], strict.numel())),
        ("sq_norm", sq_norm, tuple(sq_diff.shape)),
        ("previous", previous, tuple(sq_diff.shape)),
        ("strict", strict, (strict.numel(),)),
    ):
        kinds = (torch.float32, torch.float64) if name == "sq_diff" else (sq_diff.dtype,)
        _dispatch._expect(name, tensor, shape, kinds, sq_diff.device)
    if backend == "auto" and _dispatch.dispatched(sq_diff):
        _op(sq_diff, sq_norm, previous, strict, freeze, floor)
    else:
        _run(backend, sq_diff, sq_norm, previous, strict, freeze, floor)


def _run(
    backend: str, sq_diff: Tensor, sq_norm: Tensor, previous: Tensor, strict: Tensor, freeze: float, floor: float
) -> None:
    tensors = (sq_diff, sq_norm, previous, strict)
    dense, name = all(t.is_contiguous() for t in tensors), _dispatch.resolve(backend, (sq_diff,))
    if name == "triton" and dense:
        from . import _triton

        with torch.cuda.device_of(sq_diff):
            _triton.launch(*tensors, freeze, floor)
    elif name == "cpp" and dense and sq_diff.dtype == torch.float64:
        extension, _ = _dispatch.extension()
        assert extension is not None
        extension.judge_steps(*(t.data_ptr() for t in tensors), *sq_diff.shape, freeze, floor)
    else:
        _reference(*tensors, freeze, floor)


def _auto(sq_diff: Tensor, sq_norm: Tensor, previous: Tensor, strict: Tensor, freeze: float, floor: float) -> None:
    _run("auto", sq_diff, sq_norm, previous, strict, freeze, floor)


_op = torch.library.custom_op("deqdiff_fast::judge_steps", _auto, mutates_args=("sq_diff", "previous"), schema=_SCHEMA)
_op.register_fake(lambda *args, **kwargs: None)
