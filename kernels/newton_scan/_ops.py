"""The quasi-Newton scan as torch knows it: schema, mutated arguments, backends."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import _dispatch
from .._ops import _address, _packed, _write_back
from .reference import newton_scan as _reference

_SCHEMA = (
    "(Tensor(a!) states, Tensor predictions, Tensor state_coef, Tensor model_coef, Tensor slope, Tensor lo, Tensor hi, "
    "Tensor(b!) sq_diff, Tensor(c!) sq_norm, Tensor(d!)? z=None, Tensor(e!)? e=None, Tensor(f!)? filled=None, "
    "int column=0, float ridge=1e-6, float floor=1e-5, Tensor? drift=None, "
    "Tensor(g!)? workspace=None) -> ()"
)


def _cpp(
    states: Tensor, predictions: Tensor, state_coef: Tensor, model_coef: Tensor, slope: Tensor, lo: Tensor, hi: Tensor,
    sq_diff: Tensor, sq_norm: Tensor, z: Tensor | None = None, e: Tensor | None = None, filled: Tensor | None = None,
    column: int = 0, ridge: float = 1e-6, floor: float = 1e-5, drift: Tensor | None = None,
) -> None:  # fmt: skip
    extension, _ = _dispatch.extension()
    assert extension is not None
    rings = () if z is None or e is None or filled is None else (z, e, filled)
    out = (states, *rings, sq_diff, sq_norm)
    used = (*_packed(out[:-2]), *_packed(out[-2:], torch.float64))
    (packed,) = _packed((predictions,))
    coefs = _packed((state_coef, model_coef), torch.float64)
    (table,) = _packed((slope,), torch.float64 if states.dtype == torch.float64 else torch.float32)
    bounds, noise = _packed((lo, hi)), None if drift is None else drift.contiguous()
    held = [t.data_ptr() for t in used[1:-2]] or [0, 0, 0]
    rows, batch, size = states.shape
    extension.newton_scan(
        _dispatch.CPP_DTYPES[states.dtype], used[0].data_ptr(), packed.data_ptr(), *(t.data_ptr() for t in coefs),
        _address(noise), table.data_ptr(), table.dim() > 1 and table.shape[1] > 1, *(t.data_ptr() for t in bounds),
        used[-2].data_ptr(), used[-1].data_ptr(), *held, rows - 1, batch, size, state_coef.shape[1],
        z.shape[0] if z is not None else 0, z.shape[1] if z is not None else 0, column, ridge, floor,
        torch.get_num_threads(),
    )  # fmt: skip
    _write_back(out, used)


def _triton(
    states: Tensor, predictions: Tensor, state_coef: Tensor, model_coef: Tensor, slope: Tensor, lo: Tensor, hi: Tensor,
    sq_diff: Tensor, sq_norm: Tensor, z: Tensor | None = None, e: Tensor | None = None, filled: Tensor | None = None,
    column: int = 0, ridge: float = 1e-6, floor: float = 1e-5, drift: Tensor | None = None,
    workspace: Tensor | None = None,
) -> None:  # fmt: skip
    from . import _triton as kernels

    rings = () if z is None or e is None or filled is None else (z, e, filled)
    out = (states, sq_diff, sq_norm, *rings)
    used = _packed(out)
    inputs = _packed((predictions, state_coef, model_coef, slope, lo, hi))
    held = used[3:] or (None, None, None)
    noise = None if drift is None else drift.contiguous()
    with torch.cuda.device_of(states):  # Triton launches on the current device
        kernels.launch(used[0], *inputs, *used[1:3], *held, column, ridge, floor, noise, workspace)
    _write_back(out, used)


BACKENDS: dict[str, Callable[..., None]] = {"reference": _reference, "cpp": _cpp, "triton": _triton}


def run(backend: str, states: Tensor, predictions: Tensor, *args: Tensor | float | None) -> None:
    """args: those of the schema, in its order."""
    coef, lo, hi, z, drift = args[0], args[3], args[4], args[7], args[-2]
    assert isinstance(coef, Tensor)
    assert isinstance(lo, Tensor)
    assert isinstance(hi, Tensor)
    others = [t for t in (z, drift) if isinstance(t, Tensor)]
    name = _dispatch.resolve(backend, (states, predictions, *others), coef.shape[1])
    if states.device.type == "cpu":
        _dispatch.check_windows(lo, hi, states.shape[0] - 1, z.shape[1] if isinstance(z, Tensor) else None)
    if states.shape[1]:
        BACKENDS[name](states, predictions, *(args if name == "triton" else args[:-1]))


def _auto(
    states: Tensor, predictions: Tensor, state_coef: Tensor, model_coef: Tensor, slope: Tensor, lo: Tensor, hi: Tensor,
    sq_diff: Tensor, sq_norm: Tensor, z: Tensor | None = None, e: Tensor | None = None, filled: Tensor | None = None,
    column: int = 0, ridge: float = 1e-6, floor: float = 1e-5, drift: Tensor | None = None,
    workspace: Tensor | None = None,
) -> None:  # fmt: skip
    run(
        "auto", states, predictions, state_coef, model_coef, slope, lo, hi, sq_diff, sq_norm, z, e, filled, column,
        ridge, floor, drift, workspace,
    )  # fmt: skip


newton_op = torch.library.custom_op(
    "deqdiff_fast::newton_scan",
    _auto,
    mutates_args=("states", "sq_diff", "sq_norm", "z", "e", "filled", "workspace"),
    schema=_SCHEMA,
)
for _device in ("cpu", "cuda"):
    newton_op.register_kernel(_device, _auto)
newton_op.register_fake(lambda *args, **kwargs: None)
