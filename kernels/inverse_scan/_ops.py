"""The inverse scan as torch knows it: schema, mutated arguments, backends."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...errors import BackendUnavailableError
from .. import _dispatch
from .._ops import _address, _packed, _write_back
from .reference import inverse_scan as _reference

_SCHEMA = (
    "(Tensor(a!) states, Tensor predictions, Tensor state_coef, Tensor model_coef, Tensor slope, Tensor weight, "
    "Tensor lo, Tensor hi, Tensor(b!) sq_miss, Tensor(c!) z, Tensor(d!) e, Tensor(e!) filled, int column, "
    "float damping=1.0, float ridge=1e-6, float stale=8.0, float floor=1e-6, float reach=1.0, Tensor? drift=None) "
    "-> ()"
)


def _cpp(
    states: Tensor, predictions: Tensor, state_coef: Tensor, model_coef: Tensor, slope: Tensor, weight: Tensor,
    lo: Tensor, hi: Tensor, sq_miss: Tensor, z: Tensor, e: Tensor, filled: Tensor, column: int,
    damping: float = 1.0, ridge: float = 1e-6, stale: float = 8.0, floor: float = 1e-6, reach: float = 1.0,
    drift: Tensor | None = None,
) -> None:  # fmt: skip
    extension, _ = _dispatch.extension()
    assert extension is not None
    out = (states, z, e, filled, sq_miss)
    used = (*_packed(out[:-1]), *_packed(out[-1:], torch.float64))
    (packed,) = _packed((predictions,))
    coefs = _packed((state_coef, model_coef), torch.float64)
    tables = _packed((slope, weight), torch.float64 if states.dtype == torch.float64 else torch.float32)
    bounds, noise = _packed((lo, hi)), None if drift is None else drift.contiguous()
    rows, batch, size = states.shape
    x, ring_z, ring_e, count, miss = (t.data_ptr() for t in used)
    extension.inverse_scan(
        _dispatch.CPP_DTYPES[states.dtype], x, packed.data_ptr(), *(t.data_ptr() for t in coefs), _address(noise),
        tables[0].data_ptr(), tables[0].shape[1] > 1, tables[1].data_ptr(), tables[1].shape[1] > 1,
        *(t.data_ptr() for t in bounds), miss, ring_z, ring_e, count, rows - 1, batch, size, state_coef.shape[1],
        z.shape[0], z.shape[1], column, damping, ridge, stale, floor, reach, torch.get_num_threads(),
    )  # fmt: skip
    _write_back(out, used)


BACKENDS: dict[str, Callable[..., None]] = {"reference": _reference, "cpp": _cpp}


def run(backend: str, states: Tensor, predictions: Tensor, *args: Tensor | float | None) -> None:
    """args: those of the schema, in its order. Where Triton serves the other ops, torch does this one."""
    coef, lo, hi, z, drift = args[0], args[4], args[5], args[7], args[-1]
    assert isinstance(coef, Tensor)
    assert isinstance(lo, Tensor)
    assert isinstance(hi, Tensor)
    assert isinstance(z, Tensor)
    if backend == "triton":
        raise BackendUnavailableError(f"backend 'triton' has no inverse scan; it runs on {', '.join(BACKENDS)}")
    others = [t for t in (z, drift) if isinstance(t, Tensor)]
    name = _dispatch.resolve(backend, (states, predictions, *others), coef.shape[1])
    if states.device.type == "cpu":
        _dispatch.check_windows(lo, hi, states.shape[0] - 1, z.shape[1])
    if states.shape[1]:
        fits = name in BACKENDS and z.shape[0] <= _dispatch.MAX_HISTORY
        BACKENDS[name if fits else "reference"](states, predictions, *args)


def _auto(
    states: Tensor, predictions: Tensor, state_coef: Tensor, model_coef: Tensor, slope: Tensor, weight: Tensor,
    lo: Tensor, hi: Tensor, sq_miss: Tensor, z: Tensor, e: Tensor, filled: Tensor, column: int,
    damping: float = 1.0, ridge: float = 1e-6, stale: float = 8.0, floor: float = 1e-6, reach: float = 1.0,
    drift: Tensor | None = None,
) -> None:  # fmt: skip
    run(
        "auto", states, predictions, state_coef, model_coef, slope, weight, lo, hi, sq_miss, z, e, filled, column,
        damping, ridge, stale, floor, reach, drift,
    )  # fmt: skip


inverse_op = torch.library.custom_op(
    "deqdiff_fast::inverse_scan",
    _reference,
    mutates_args=("states", "sq_miss", "z", "e", "filled"),
    schema=_SCHEMA,
)
for _device in ("cpu", "cuda"):
    inverse_op.register_kernel(_device, _auto)
inverse_op.register_fake(lambda *args, **kwargs: None)
