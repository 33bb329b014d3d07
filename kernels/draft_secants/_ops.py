"""The secants of a draft's remainder as torch knows them: schema, mutated arguments, backends."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import _dispatch
from .._ops import _packed, _write_back
from .reference import draft_secants as _reference

_SCHEMA = (
    "(Tensor states, Tensor predictions, Tensor made, Tensor at, Tensor lo, Tensor hi, Tensor(a!) z, Tensor(b!) rest, "
    "Tensor(c!) filled, Tensor(d!) weights, int column, float ridge=1e-6, float floor=1e-5, "
    "Tensor(e!)? workspace=None) -> ()"
)


def _cpp(
    states: Tensor, predictions: Tensor, made: Tensor, at: Tensor, lo: Tensor, hi: Tensor, z: Tensor, rest: Tensor,
    filled: Tensor, weights: Tensor, column: int, ridge: float, floor: float,
) -> None:  # fmt: skip
    extension, _ = _dispatch.extension()
    assert extension is not None
    out = (z, rest, filled, weights)
    used, inputs = _packed(out), _packed((states, predictions, made, at, lo, hi))
    extension.draft_secants(
        _dispatch.CPP_DTYPES[states.dtype], *(t.data_ptr() for t in (*inputs, *used)), predictions.shape[0],
        *made.shape, z.shape[0], column, ridge, floor, torch.get_num_threads(),
    )  # fmt: skip
    _write_back(out, used)


def _triton(
    states: Tensor, predictions: Tensor, made: Tensor, at: Tensor, lo: Tensor, hi: Tensor, z: Tensor, rest: Tensor,
    filled: Tensor, weights: Tensor, column: int, ridge: float, floor: float, workspace: Tensor | None = None,
) -> None:  # fmt: skip
    from . import _triton as kernels

    out = (z, rest, filled, weights)
    used = _packed(out)
    with torch.cuda.device_of(states):  # Triton launches on the current device
        inputs = _packed((states, predictions, made, at, lo, hi))
        kernels.launch(*inputs, *used, column, ridge, floor, workspace)
    _write_back(out, used)


BACKENDS: dict[str, Callable[..., None]] = {"reference": _reference, "cpp": _cpp, "triton": _triton}


def run(backend: str, states: Tensor, predictions: Tensor, made: Tensor, *args: Tensor | float | None) -> None:
    """args: those of the schema, in its order."""
    lo, hi = args[1], args[2]
    assert isinstance(lo, Tensor)
    assert isinstance(hi, Tensor)
    name = _dispatch.resolve(backend, (states, predictions, made))
    if states.device.type == "cpu":
        _dispatch.check_windows(lo, hi, predictions.shape[0])
    if states.shape[1]:
        BACKENDS[name](states, predictions, made, *(args if name == "triton" else args[:-1]))


def _auto(
    states: Tensor, predictions: Tensor, made: Tensor, at: Tensor, lo: Tensor, hi: Tensor, z: Tensor, rest: Tensor,
    filled: Tensor, weights: Tensor, column: int, ridge: float = 1e-6, floor: float = 1e-5,
    workspace: Tensor | None = None,
) -> None:  # fmt: skip
    run("auto", states, predictions, made, at, lo, hi, z, rest, filled, weights, column, ridge, floor, workspace)


secants_op = torch.library.custom_op(
    "deqdiff_fast::draft_secants",
    _auto,
    mutates_args=("z", "rest", "filled", "weights", "workspace"),
    schema=_SCHEMA,
)
for _device in ("cpu", "cuda"):
    secants_op.register_kernel(_device, _auto)
secants_op.register_fake(lambda *args, **kwargs: None)
