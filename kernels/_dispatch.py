"""Which backend serves a call, and the one place where the ops' arguments are checked."""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
import os
from types import ModuleType

import torch
from torch import Tensor

from ..errors import BackendUnavailableError

logger = logging.getLogger("deqdiff_fast")

BACKENDS = ("auto", "reference", "cpp", "triton")
SCOPES = ("timestep", "trajectory", "triangular")  # the position is the extension's code for the scope
SYMBOLS = (  # what the ops call in the extension
    "ddim_update", "anderson_step", "newton_scan", "inverse_scan", "draft_secants", "draft_scan", "judge_steps",
)  # fmt: skip
MAX_HISTORY = 8
MAX_LAGS = 16  # PNDM with its Runge-Kutta start needs 11
TRITON_LAGS = 4  # the Triton kernels keep the lagged rows in registers

_WIDE = (torch.float32, torch.float64)
_STORAGE = (*_WIDE, torch.bfloat16, torch.float16)
_INDEX = (torch.int32,)
CPP_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}


@functools.cache
def extension() -> tuple[ModuleType | None, str]:
    """The compiled extension, or None and the reason why it cannot be used."""
    try:
        from .. import _C  # type: ignore[attr-defined, unused-ignore]
    except ImportError as error:
        return None, f"deqdiff_fast._C cannot be imported ({error}); build it with: pip install -e ."
    missing = [name for name in SYMBOLS if not hasattr(_C, name)]
    if missing:  # built from an older checkout: an editable installation does not notice
        return None, f"deqdiff_fast._C is out of date (it lacks {', '.join(missing)}); rebuild it with: pip install ."
    return _C, "available"


def interpreting() -> bool:
    """Triton decides this when a kernel is decorated, so the variable has to be set before the first kernel is used."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


@functools.cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _triton_status() -> str:
    if not _triton_installed():
        return "triton is not installed; install it with: pip install triton"
    if interpreting() or torch.cuda.is_available():
        return "available"
    return "torch finds no CUDA device; set TRITON_INTERPRET=1 to run the kernels, slowly, on the CPU"


def available_backends() -> dict[str, str]:
    """Name of each backend -> "available", or the reason why it is not and what would make it so."""
    return {"reference": "available", "cpp": extension()[1], "triton": _triton_status()}


def _obstacle(backend: str, storage: tuple[Tensor, ...], lags: int) -> str:
    """Why `backend` cannot serve these tensors; empty if it can."""
    kind = storage[0].device.type
    if backend == "cpp":
        if kind != "cpu":
            return f"it works on CPU tensors, got {kind} tensors"
        if storage[0].dtype not in CPP_DTYPES or any(t.dtype != storage[0].dtype for t in storage):
            found = ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in storage}))
            return f"it stores one of float32, float64 and bfloat16 throughout, got {found}"
        status = extension()[1]
        return "" if status == "available" else status
    if backend == "triton":
        status = _triton_status()
        if status != "available":
            return status
        if kind != "cuda" and not (kind == "cpu" and interpreting()):
            return f"it works on CUDA tensors (on CPU tensors only under TRITON_INTERPRET=1), got {kind} tensors"
        if lags > TRITON_LAGS:
            return f"it takes at most {TRITON_LAGS} lags, got {lags}"
    return ""


@functools.cache
def _announce(backend: str, kind: str, reason: str) -> None:
    logger.info("kernels: backend %r serves %s tensors%s", backend, kind, f" ({reason})" if reason else "")


def resolve(backend: str, storage: tuple[Tensor, ...], lags: int = 1) -> str:
    """The backend that serves tensors with the device and dtypes of `storage` (states first) and that many lags.

    Raises BackendUnavailableError when a backend asked for by name cannot; "auto" logs its choice once.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend != "auto":
        obstacle = _obstacle(backend, storage, lags)
        if obstacle:
            raise BackendUnavailableError(f"backend {backend!r} is not available here: {obstacle}")
        return backend
    kind = storage[0].device.type
    fast = {"cpu": "cpp", "cuda": "triton"}.get(kind)
    reason = _obstacle(fast, storage, lags) if fast else "no kernel is written for this device"
    chosen = "reference" if reason or fast is None else fast
    _announce(chosen, kind, reason)
    return chosen


def resolve_light(backend: str, tensor: Tensor) -> str:
    """As `resolve`, for ops that are not worth a kernel on the CPU: there "auto" and "cpp" mean the reference."""
    if backend == "cpp" or (backend == "auto" and tensor.device.type != "cuda"):
        return "reference"
    return resolve(backend, (tensor,))


def dispatched(tensor: Tensor) -> bool:
    """Whether a call must go through torch's dispatcher, for a compiler, a dispatch mode or a tensor subclass to see.

    Where nobody looks, calling the backend at once saves most of the time of an op on a small problem.
    """
    return type(tensor) is not Tensor or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def _expect(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], device: torch.device
) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
    if tensor.dtype not in dtypes:
        names = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ValueError(f"{name}: expected dtype {names}, got {str(tensor.dtype).removeprefix('torch.')}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected it on {device} like states, got {tensor.device}")


def check_states(states: Tensor, predictions: Tensor, lo: Tensor, hi: Tensor) -> None:
    """What every op on a chain takes; raises ValueError."""
    if states.dim() != 3 or states.shape[0] < 2 or states.shape[2] < 1:
        raise ValueError(f"states: expected shape (T + 1, B, D) with T, D >= 1, got {tuple(states.shape)}")
    (rows, batch, size), device = states.shape, states.device
    _expect("states", states, (rows, batch, size), _STORAGE, device)
    _expect("predictions", predictions, (rows - 1, batch, size), _STORAGE, device)
    _expect("lo", lo, (batch,), _INDEX, device)
    _expect("hi", hi, (batch,), _INDEX, device)


def check_slope(slope: Tensor, steps: int, size: int, device: torch.device, name: str = "slope") -> None:
    """One number a row, or one an element; raises ValueError."""
    shapes = ((steps, 1), (steps, size))
    if slope.shape not in shapes or not slope.is_floating_point() or slope.device != device:
        raise ValueError(
            f"{name}: expected a floating-point tensor {shapes[0]} or {shapes[1]} on {device}, got {slope.dtype} "
            f"{tuple(slope.shape)} on {slope.device}"
        )


def check_anchors(states: Tensor, made: Tensor, z: Tensor, rest: Tensor, weights: Tensor, column: int) -> None:
    """What a draft's rounds remember; raises ValueError."""
    (rows, batch, size), device, kinds = states.shape, states.device, (states.dtype,)
    if made.dim() != 3 or not 1 <= made.shape[0] < rows:
        raise ValueError(f"made: expected shape (A, B, D) with 1 <= A <= {rows - 1}, got {tuple(made.shape)}")
    if z.dim() != 4 or not 1 <= z.shape[0] <= MAX_HISTORY:
        raise ValueError(f"z: expected shape (H + 1, A, B, D) with H < {MAX_HISTORY}, got {tuple(z.shape)}")
    count, secants = made.shape[0], z.shape[0] - 1
    _expect("made", made, (count, batch, size), kinds, device)
    _expect("z", z, (secants + 1, count, batch, size), kinds, device)
    _expect("rest", rest, (secants + 1, count, batch, size), kinds, device)
    _expect("weights", weights, (count, batch, secants, secants), (torch.float64,), device)
    if not 0 <= column <= secants:
        raise ValueError(f"column: expected 0 <= column < {secants + 1} (the round modulo H + 1), got {column}")


def check_scan(
    states: Tensor, predictions: Tensor, state_coef: Tensor, model_coef: Tensor, lo: Tensor, hi: Tensor,
    sq_diff: Tensor, sq_norm: Tensor, drift: Tensor | None,
) -> None:  # fmt: skip
    """Shapes, dtypes and devices of the arguments that both ops share; raises ValueError."""
    check_states(states, predictions, lo, hi)
    if state_coef.dim() != 2 or not 1 <= state_coef.shape[1] <= MAX_LAGS:
        raise ValueError(f"state_coef: expected shape (T, L) with 1 <= L <= {MAX_LAGS}, got {tuple(state_coef.shape)}")
    (rows, batch, size), device, lags = states.shape, states.device, state_coef.shape[1]
    steps = rows - 1
    _expect("state_coef", state_coef, (steps, lags), _WIDE, device)
    _expect("model_coef", model_coef, (steps, lags), _WIDE, device)
    _expect("sq_diff", sq_diff, (steps, batch), _WIDE, device)
    _expect("sq_norm", sq_norm, (steps, batch), _WIDE, device)
    if drift is not None:
        _expect("drift", drift, (steps, batch, size), _STORAGE, device)


def check_anderson(
    states: Tensor, f: Tensor, g: Tensor, gram: Tensor, filled: Tensor, column: int, scope: str, ridge: float,
    damping: float, stale: float,
) -> None:  # fmt: skip
    """The history and settings of `anderson_step`; raises ValueError."""
    if f.dim() != 4 or not 1 <= f.shape[0] <= MAX_HISTORY or f.shape[1] < 1:
        raise ValueError(f"f: expected shape (M, W, B, D) with 1 <= M <= {MAX_HISTORY}, W >= 1, got {tuple(f.shape)}")
    (history, width), (_, batch, size), device = f.shape[:2], states.shape, states.device
    _expect("f", f, (history, width, batch, size), _STORAGE, device)
    _expect("g", g, (history, width, batch, size), _STORAGE, device)
    _expect("gram", gram, (width, batch, history, history), _WIDE, device)
    _expect("filled", filled, (width, batch), _INDEX, device)
    if not 0 <= column < history:
        raise ValueError(f"column: expected 0 <= column < {history} (the round modulo the history), got {column}")
    if scope not in SCOPES:
        raise ValueError(f"scope: expected one of {', '.join(SCOPES)}, got {scope!r}")
    if not (ridge >= 0 and math.isfinite(ridge)):
        raise ValueError(f"ridge: expected a finite number >= 0, got {ridge}")
    if not math.isfinite(damping):
        raise ValueError(f"damping: expected a finite number, got {damping}")
    if not stale >= 0:
        raise ValueError(f"stale: expected a number >= 0 (inf keeps every column), got {stale}")


def check_windows(lo: Tensor, hi: Tensor, steps: int, width: int | None = None) -> None:
    """Values of the windows, where reading them costs nothing (on the CPU); the CUDA kernels clamp instead."""
    limit = steps if width is None else width
    for b, (first, last) in enumerate(zip(lo.tolist(), hi.tolist(), strict=True)):
        if not 0 <= first <= last <= steps:
            raise ValueError(f"lo, hi: expected 0 <= lo <= hi <= {steps}, got {first}, {last} for sample {b}")
        if last - first > limit:
            raise ValueError(f"lo, hi: expected at most W = {limit} active rows, got {last - first} for sample {b}")
