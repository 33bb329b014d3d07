"""The inverse scan as torch knows it: schema, mutated arguments, backends."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...errors import BackendUnavailableError
from .. import _dispatch
from .reference import inverse_scan as _reference

_SCHEMA = (
    "(Tensor(a!) states, Tensor predictions, Tensor state_coef, Tensor model_coef, Tensor slope, Tensor weight, "
    "Tensor lo, Tensor hi, Tensor(b!) sq_miss, Tensor(c!) z, Tensor(d!) e, Tensor(e!) filled, int column, "
    "float damping=1.0, float ridge=1e-6, float stale=8.0, float floor=1e-6, float reach=1.0, Tensor? drift=None) "
    "-> ()"
)
BACKENDS: dict[str, Callable[..., None]] = {"reference": _reference}


def run(backend: str, states: Tensor, predictions: Tensor, *args: Tensor | float | None) -> None:
    """args: those of the schema, in its order."""
    lo, hi, z = args[4], args[5], args[7]
    assert isinstance(lo, Tensor)
    assert isinstance(hi, Tensor)
    assert isinstance(z, Tensor)
    if backend not in ("auto", *BACKENDS):
        raise BackendUnavailableError(f"backend {backend!r} has no inverse scan; it runs on {', '.join(BACKENDS)}")
    if states.device.type == "cpu":
        _dispatch.check_windows(lo, hi, states.shape[0] - 1, z.shape[1])
    if states.shape[1]:
        BACKENDS["reference"](states, predictions, *args)


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
