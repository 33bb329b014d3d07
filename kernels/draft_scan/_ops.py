"""The draft's scan as torch knows it: schema, mutated arguments, backends."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import _dispatch, _workspace
from .._ops import _address, _packed, _write_back
from .reference import draft_scan as _reference

_SCHEMA = (
    "(Tensor(a!) states, Tensor predictions, Tensor? said, Tensor(b!) made, Tensor(c!) turn, Tensor shares, "
    "Tensor state_coef, Tensor model_coef, Tensor slope, Tensor lo, Tensor hi, Tensor(d!) sq_diff, Tensor(e!) sq_norm, "
    "Tensor(f!) carry, Tensor z, Tensor rest, Tensor weights, int column, int number, int previous, int start, "
    "int stop, bool charting=False, bool last=True, Tensor? drift=None, Tensor(g!)? workspace=None) -> ()"
)


def _cpp(
    states: Tensor, predictions: Tensor, said: Tensor | None, made: Tensor, turn: Tensor, shares: Tensor,
    state_coef: Tensor, model_coef: Tensor, slope: Tensor, lo: Tensor, hi: Tensor, sq_diff: Tensor, sq_norm: Tensor,
    carry: Tensor, z: Tensor, rest: Tensor, weights: Tensor, column: int, number: int, previous: int, start: int,
    stop: int, charting: bool, last: bool, drift: Tensor | None = None,
) -> None:  # fmt: skip
    extension, _ = _dispatch.extension()
    assert extension is not None
    out = (states, made, turn, carry, sq_diff, sq_norm)
    used = (*_packed(out[:4]), *_packed(out[4:], torch.float64))
    packed, ring_z, ring_rest, fit = _packed((predictions, z, rest, weights))
    heard, noise = (None if t is None else t.contiguous() for t in (said, drift))
    tables = _packed((shares, state_coef, model_coef), torch.float64)
    (steep,) = _packed((slope,), _workspace.wide(states.dtype))
    low, high = _packed((lo, hi))
    x, kept, turned, carried, diff, norm = (t.data_ptr() for t in used)
    extension.draft_scan(
        _dispatch.CPP_DTYPES[states.dtype], x, packed.data_ptr(), _address(heard), kept, turned,
        *(t.data_ptr() for t in tables), _address(noise), steep.data_ptr(), steep.shape[1] > 1, low.data_ptr(),
        high.data_ptr(), diff, norm, carried, ring_z.data_ptr(), ring_rest.data_ptr(), fit.data_ptr(),
        predictions.shape[0], *made.shape, state_coef.shape[1], z.shape[0], column, number, previous, start, stop,
        charting, torch.get_num_threads(),
    )  # fmt: skip
    _write_back(out, used)


def _triton(
    states: Tensor, predictions: Tensor, said: Tensor | None, made: Tensor, turn: Tensor, shares: Tensor,
    state_coef: Tensor, model_coef: Tensor, slope: Tensor, lo: Tensor, hi: Tensor, sq_diff: Tensor, sq_norm: Tensor,
    carry: Tensor, z: Tensor, rest: Tensor, weights: Tensor, column: int, number: int, previous: int, start: int,
    stop: int, charting: bool, last: bool, drift: Tensor | None = None, workspace: Tensor | None = None,
) -> None:  # fmt: skip
    from . import _triton as kernels

    if workspace is None:
        raise ValueError("workspace: expected one of draft_scan_bytes(...) for the Triton kernels, got None")
    out = (states, made, turn, sq_diff, sq_norm, carry)
    used = _packed(out)
    with torch.cuda.device_of(states):  # Triton launches on the current device
        heard, noise = (None if t is None else t.contiguous() for t in (said, drift))
        inputs = _packed((predictions, shares, state_coef, model_coef, slope, lo, hi, z, rest, weights))
        place = (column, number, previous, start, stop, charting, last)
        kernels.launch(*used, heard, noise, *inputs, *place, workspace)
    _write_back(out, used)


BACKENDS: dict[str, Callable[..., None]] = {"reference": _reference, "cpp": _cpp, "triton": _triton}


def run(backend: str, states: Tensor, predictions: Tensor, said: Tensor | None, *args: Tensor | float | None) -> None:
    """args: those of the schema, in its order."""
    coef, lo, hi, drift = args[3], args[6], args[7], args[-2]
    assert isinstance(coef, Tensor)
    assert isinstance(lo, Tensor)
    assert isinstance(hi, Tensor)
    storage = (states, predictions) if not isinstance(drift, Tensor) else (states, predictions, drift)
    name = _dispatch.resolve(backend, storage, coef.shape[1])
    if states.device.type == "cpu":
        _dispatch.check_windows(lo, hi, predictions.shape[0])
    if states.shape[1]:
        BACKENDS[name](states, predictions, said, *(args if name == "triton" else args[:-1]))


def _auto(
    states: Tensor, predictions: Tensor, said: Tensor | None, made: Tensor, turn: Tensor, shares: Tensor,
    state_coef: Tensor, model_coef: Tensor, slope: Tensor, lo: Tensor, hi: Tensor, sq_diff: Tensor, sq_norm: Tensor,
    carry: Tensor, z: Tensor, rest: Tensor, weights: Tensor, column: int, number: int, previous: int, start: int,
    stop: int, charting: bool = False, last: bool = True, drift: Tensor | None = None, workspace: Tensor | None = None,
) -> None:  # fmt: skip
    run(
        "auto", states, predictions, said, made, turn, shares, state_coef, model_coef, slope, lo, hi, sq_diff, sq_norm,
        carry, z, rest, weights, column, number, previous, start, stop, charting, last, drift, workspace,
    )  # fmt: skip


scan_op = torch.library.custom_op(
    "deqdiff_fast::draft_scan",
    _auto,
    mutates_args=("states", "made", "turn", "sq_diff", "sq_norm", "carry", "workspace"),
    schema=_SCHEMA,
)
for _device in ("cpu", "cuda"):
    scan_op.register_kernel(_device, _auto)
scan_op.register_fake(lambda *args, **kwargs: None)
