"""Where numbers live that nobody has placed, and float64 where a device has none."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])
_hidden = threading.local()  # .device: the user's default one, while ours is in its place


def default_device() -> torch.device:
    """Where torch puts what nobody has placed. `torch.get_default_device` does not say: in torch 2.6 it knows nothing
    of `with torch.device`, and fails once a default was taken back."""
    return torch.empty(0).device


def tables_on_cpu(function: Function) -> Function:
    """A function of ours whose tables lie on the CPU, also under `torch.set_default_device` or `with torch.device`."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        own = default_device()
        if own.type == "cpu":
            return function(*args, **kwargs)
        before, _hidden.device = getattr(_hidden, "device", None), own
        try:
            with torch.device("cpu"):
                return function(*args, **kwargs)
        finally:
            _hidden.device = before

    return wrapped  # type: ignore[return-value]


Class = TypeVar("Class", bound=type)


def methods_with_tables_on_cpu(kind: Class) -> Class:
    """A class whose constructor and public methods are such functions."""
    for name, value in list(vars(kind).items()):
        if callable(value) and (name == "__init__" or not name.startswith("_")):
            setattr(kind, name, tables_on_cpu(value))
    return kind


@contextmanager
def users_default() -> Iterator[None]:
    """For calls of a user's code from within: it finds its own default device."""
    device = getattr(_hidden, "device", None)
    if device is None:
        yield
        return
    _hidden.device = None
    try:
        with device:
            yield
    finally:
        _hidden.device = device


def hidden_default() -> torch.device | None:
    """What `users_default` brings back; None where it has nothing to do."""
    found: torch.device | None = getattr(_hidden, "device", None)
    return found


def hidden_in_backward(backward: Function) -> Function:
    """A backward of ours that calls the model once more: torch runs it without the default device of the forward, which
    is `ctx.default_device`."""

    @functools.wraps(backward)
    def wrapped(ctx: Any, *grads: Tensor) -> Any:
        before, _hidden.device = hidden_default(), ctx.default_device
        try:
            return backward(ctx, *grads)
        finally:
            _hidden.device = before

    return wrapped  # type: ignore[return-value]


def float64(value: Tensor) -> Tensor:
    """In float64; on the CPU where the device has no such numbers (MPS)."""
    return value.double() if value.device.type != "mps" else value.cpu().double()
