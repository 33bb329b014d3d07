"""The ops as torch knows them: schema, mutated arguments, one registration per device, fake kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import _dispatch
from .anderson_mix.reference import anderson_step as _anderson_reference
from .ddim_update.reference import ddim_update as _ddim_reference

_SCAN = (
    "Tensor(a!) states, Tensor predictions, Tensor state_coef, Tensor model_coef, Tensor lo, Tensor hi, "
    "Tensor(b!) sq_diff, Tensor(c!) sq_norm"
)
_DDIM_SCHEMA = f"({_SCAN}, Tensor? drift=None, Tensor(h!)? workspace=None) -> ()"
_ANDERSON_SCHEMA = (
    f"({_SCAN}, Tensor(d!) f, Tensor(e!) g, Tensor(f!) gram, Tensor(g!) filled, int column, str scope, float ridge, "
    "bool relative_ridge, float damping, float stale, Tensor? drift=None, Tensor(h!)? workspace=None) -> ()"
)


def _packed(tensors: tuple[Tensor, ...], dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
    """What a kernel can address by pointer: the tensors themselves wherever they are dense, else dense copies."""
    return tuple((t if dtype is None else t.to(dtype)).contiguous() for t in tensors)


def _write_back(originals: tuple[Tensor, ...], used: tuple[Tensor, ...]) -> None:
    for original, stand_in in zip(originals, used, strict=True):
        if stand_in is not original:
            original.copy_(stand_in)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _ddim_cpp(
    states: Tensor, predictions: Tensor, state_coef: Tensor, model_coef: Tensor, lo: Tensor, hi: Tensor,
    sq_diff: Tensor, sq_norm: Tensor, drift: Tensor | None = None,
) -> None:  # fmt: skip
    extension, _ = _dispatch.extension()
    assert extension is not None
    out = (states, sq_diff, sq_norm)
    used = (*_packed(out[:1]), *_packed(out[1:], torch.float64))
    inputs = (*_packed((predictions,)), *_packed((state_coef, model_coef), torch.float64), *_packed((lo, hi)))
    noise = None if drift is None else drift.contiguous()
    rows, batch, size = states.shape
    extension.ddim_update(
        _dispatch.CPP_DTYPES[states.dtype], used[0].data_ptr(), *(t.data_ptr() for t in inputs[:3]), _address(noise),
        *(t.data_ptr() for t in (*inputs[3:], *used[1:])), rows - 1, batch, size, state_coef.shape[1],
        torch.get_num_threads(),
    )  # fmt: skip
    _write_back(out, used)


def _anderson_cpp(
    states: Tensor, predictions: Tensor, state_coef: Tensor, model_coef: Tensor, lo: Tensor, hi: Tensor,
    sq_diff: Tensor, sq_norm: Tensor, f: Tensor, g: Tensor, gram: Tensor, filled: Tensor, column: int, scope: str,
    ridge: float, relative_ridge: bool, damping: float, stale: float, drift: Tensor | None = None,
) -> None:  # fmt: skip
    extension, _ = _dispatch.extension()
    assert extension is not None
    out = (states, f, g, filled, sq_diff, sq_norm, gram)
    used = (*_packed(out[:4]), *_packed(out[4:], torch.float64))
    inputs = (*_packed((predictions,)), *_packed((state_coef, model_coef), torch.float64), *_packed((lo, hi)))
    noise = None if drift is None else drift.contiguous()
    rows, batch, size = states.shape
    x, f_, g_, filled_, diff, norm, gram_ = (t.data_ptr() for t in used)
    extension.anderson_step(
        _dispatch.CPP_DTYPES[states.dtype], x, *(t.data_ptr() for t in inputs[:3]), _address(noise),
        *(t.data_ptr() for t in inputs[3:]), diff, norm, f_, g_, gram_, filled_, rows - 1, batch, size,
        state_coef.shape[1], f.shape[0], f.shape[1], column, _dispatch.SCOPES.index(scope), ridge, relative_ridge,
        damping, stale, torch.get_num_threads(),
    )  # fmt: skip
    _write_back(out, used)


def _ddim_triton(
    states: Tensor, predictions: Tensor, state_coef: Tensor, model_coef: Tensor, lo: Tensor, hi: Tensor,
    sq_diff: Tensor, sq_norm: Tensor, drift: Tensor | None = None, workspace: Tensor | None = None,
) -> None:  # fmt: skip
    from .ddim_update import _triton

    out = (states, sq_diff, sq_norm)
    used = _packed(out)
    inputs = _packed((predictions, state_coef, model_coef, lo, hi))
    with torch.cuda.device_of(states):  # Triton launches on the current device
        _triton.launch(used[0], *inputs, *used[1:], None if drift is None else drift.contiguous(), workspace)
    _write_back(out, used)


def _anderson_triton(
    states: Tensor, predictions: Tensor, state_coef: Tensor, model_coef: Tensor, lo: Tensor, hi: Tensor,
    sq_diff: Tensor, sq_norm: Tensor, f: Tensor, g: Tensor, gram: Tensor, filled: Tensor, column: int, scope: str,
    ridge: float, relative_ridge: bool, damping: float, stale: float, drift: Tensor | None = None,
    workspace: Tensor | None = None,
) -> None:  # fmt: skip
    from .anderson_mix import _triton

    out = (states, sq_diff, sq_norm, f, g, gram, filled)
    used = _packed(out)
    inputs = _packed((predictions, state_coef, model_coef, lo, hi))
    noise = None if drift is None else drift.contiguous()
    with torch.cuda.device_of(states):  # Triton launches on the current device
        _triton.launch(
            used[0], *inputs, *used[1:], column, scope, ridge, relative_ridge, damping, stale, noise, workspace
        )  # fmt: skip
    _write_back(out, used)


DDIM: dict[str, Callable[..., None]] = {"reference": _ddim_reference, "cpp": _ddim_cpp, "triton": _ddim_triton}
ANDERSON: dict[str, Callable[..., None]] = {
    "reference": _anderson_reference,
    "cpp": _anderson_cpp,
    "triton": _anderson_triton,
}


def run_ddim(
    backend: str, states: Tensor, predictions: Tensor, state_coef: Tensor, model_coef: Tensor, lo: Tensor, hi: Tensor,
    sq_diff: Tensor, sq_norm: Tensor, drift: Tensor | None = None, workspace: Tensor | None = None,
) -> None:  # fmt: skip
    """The op on one backend."""
    storage = (states, predictions) if drift is None else (states, predictions, drift)
    name = _dispatch.resolve(backend, storage, state_coef.shape[1])
    if states.device.type == "cpu":
        _dispatch.check_windows(lo, hi, predictions.shape[0])
    if states.shape[1]:
        scratch = (workspace,) if name == "triton" else ()
        DDIM[name](states, predictions, state_coef, model_coef, lo, hi, sq_diff, sq_norm, drift, *scratch)


def run_anderson(
    backend: str, states: Tensor, predictions: Tensor, state_coef: Tensor, model_coef: Tensor, lo: Tensor, hi: Tensor,
    sq_diff: Tensor, sq_norm: Tensor, f: Tensor, *rest: Tensor | float | str | None,
) -> None:  # fmt: skip
    """The op on one backend; rest: g, gram, ..., drift, workspace in the order of the schema."""
    drift = rest[-2]
    storage = (states, predictions, f, *(t for t in (rest[0], drift) if isinstance(t, Tensor)))
    name = _dispatch.resolve(backend, storage, state_coef.shape[1])
    if states.device.type == "cpu":
        _dispatch.check_windows(lo, hi, predictions.shape[0], f.shape[1])
    if states.shape[1]:
        given = rest if name == "triton" else rest[:-1]
        ANDERSON[name](states, predictions, state_coef, model_coef, lo, hi, sq_diff, sq_norm, f, *given)


def _ddim_auto(
    states: Tensor, predictions: Tensor, state_coef: Tensor, model_coef: Tensor, lo: Tensor, hi: Tensor,
    sq_diff: Tensor, sq_norm: Tensor, drift: Tensor | None = None, workspace: Tensor | None = None,
) -> None:  # fmt: skip
    run_ddim("auto", states, predictions, state_coef, model_coef, lo, hi, sq_diff, sq_norm, drift, workspace)


def _anderson_auto(
    states: Tensor, predictions: Tensor, state_coef: Tensor, model_coef: Tensor, lo: Tensor, hi: Tensor,
    sq_diff: Tensor, sq_norm: Tensor, f: Tensor, g: Tensor, gram: Tensor, filled: Tensor, column: int, scope: str,
    ridge: float, relative_ridge: bool, damping: float, stale: float, drift: Tensor | None = None,
    workspace: Tensor | None = None,
) -> None:  # fmt: skip
    run_anderson(
        "auto", states, predictions, state_coef, model_coef, lo, hi, sq_diff, sq_norm, f, g, gram, filled, column,
        scope, ridge, relative_ridge, damping, stale, drift, workspace,
    )  # fmt: skip


ddim_op = torch.library.custom_op(
    "deqdiff_fast::ddim_update",
    _ddim_auto,
    mutates_args=("states", "sq_diff", "sq_norm", "workspace"),
    schema=_DDIM_SCHEMA,
)
anderson_op = torch.library.custom_op(
    "deqdiff_fast::anderson_step",
    _anderson_auto,
    mutates_args=("states", "sq_diff", "sq_norm", "f", "g", "gram", "filled", "workspace"),
    schema=_ANDERSON_SCHEMA,
)
for _device in ("cpu", "cuda"):  # the backend is chosen inside: it depends on what is installed
    ddim_op.register_kernel(_device, _ddim_auto)
    anderson_op.register_kernel(_device, _anderson_auto)
ddim_op.register_fake(lambda *args, **kwargs: None)  # both work in place and return nothing
anderson_op.register_fake(lambda *args, **kwargs: None)
