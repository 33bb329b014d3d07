"""Which backend serves a call."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from types import ModuleType

import torch
from torch import Tensor

from ..errors import BackendUnavailableError

logger = logging.getLogger("deqdiff_fast")

BACKENDS = ("auto", "reference", "cpp", "triton")
TRITON_LAGS = 4  # the Triton kernels keep the lagged rows in registers
CPP_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}
CPP_OPS: list[str] = []  # what the extension must have; register() adds to it


@functools.cache
def extension() -> tuple[ModuleType | None, str]:
    """The compiled extension, or None and the reason why it cannot be used."""
    try:
        from .. import _C  # type: ignore[attr-defined, unused-ignore]
    except ImportError as error:
        return None, f"deqdiff_fast._C cannot be imported ({error}); build it with: pip install -e ."
    missing = [name for name in CPP_OPS if not hasattr(_C, name)]
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


def dispatched(tensor: Tensor) -> bool:
    """Whether a call must go through torch's dispatcher, for a compiler, a dispatch mode or a tensor subclass to see.

    Where nobody looks, calling the backend at once saves most of the time of an op on a small problem.
    """
    return type(tensor) is not Tensor or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
