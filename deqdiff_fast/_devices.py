"""The user's default device and autocast, kept from our numbers; and float64 where a device has none."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])
KINDS = ("cpu", "cuda", "xpu", "mps")  # of devices that autocast knows
_hidden = threading.local()  # .settings: the user's, while torch's defaults are in their place


class Settings(NamedTuple):
    """Of the user's, which are for a model and not for our numbers."""

    device: torch.device
    """The default one."""
    autocast: dict[str, torch.dtype]
    """By the kind of device, where it is on."""

    @classmethod
    def now(cls) -> Settings:
        casts = {kind: torch.get_autocast_dtype(kind) for kind in KINDS if torch.is_autocast_enabled(kind)}
        return cls(default_device(), casts)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """A block in which they hold."""
        with ExitStack() as stack:
            now = Settings.now()
            if self.device.type != now.device.type:
                stack.enter_context(self.device)
            for kind in now.autocast.keys() | self.autocast.keys():
                wanted = self.autocast.get(kind)
                if wanted != now.autocast.get(kind):
                    stack.enter_context(torch.autocast(kind, wanted, enabled=wanted is not None))
            yield


TORCH_DEFAULTS = Settings(torch.device("cpu"), {})


def default_device() -> torch.device:
    """Where torch puts what nobody has placed. `torch.get_default_device` does not say: in torch 2.6 it knows nothing
    of `with torch.device`, and fails once a default was taken back."""
    return torch.empty(0).device


@contextmanager
def _hiding(settings: Settings | None, ours: Settings) -> Iterator[None]:
    """A block in which `ours` hold and the user's are those, to be brought back for a model."""
    before, _hidden.settings = hidden_settings(), settings
    try:
        with ours.applied():
            yield
    finally:
        _hidden.settings = before


def with_torch_defaults(function: Function) -> Function:
    """A function of ours whose tables lie on the CPU and whose products are not rounded, also under
    `torch.set_default_device`, `with torch.device` or `torch.autocast`."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        own = Settings.now()
        if own.device.type == "cpu" and not own.autocast:
            return function(*args, **kwargs)
        with _hiding(own, TORCH_DEFAULTS):
            return function(*args, **kwargs)

    return wrapped  # type: ignore[return-value]


Class = TypeVar("Class", bound=type)


def methods_with_torch_defaults(kind: Class) -> Class:
    """A class whose constructor and public methods are such functions."""
    for name, value in list(vars(kind).items()):
        if callable(value) and (name == "__init__" or not name.startswith("_")):
            setattr(kind, name, with_torch_defaults(value))
    return kind


@contextmanager
def users_settings() -> Iterator[None]:
    """For calls of a user's code from within: it finds its own default device and autocast."""
    settings = hidden_settings()
    if settings is None:
        yield
        return
    with _hiding(None, settings):
        yield


def hidden_settings() -> Settings | None:
    """What `users_settings` brings back; None where it has nothing to do."""
    found: Settings | None = getattr(_hidden, "settings", None)
    return found


def users_autocast(kind: str) -> torch.dtype | None:
    """The dtype that a model on such a device finds itself cast to; None where it does not."""
    return (hidden_settings() or Settings.now()).autocast.get(kind)


def hidden_in_backward(backward: Function) -> Function:
    """A backward of ours that calls the model once more: torch runs it without the settings of the forward, which are
    `ctx.settings`."""

    @functools.wraps(backward)
    def wrapped(ctx: Any, *grads: Tensor) -> Any:
        with _hiding(ctx.settings, TORCH_DEFAULTS):
            return backward(ctx, *grads)

    return wrapped  # type: ignore[return-value]


def float64(value: Tensor) -> Tensor:
    """In float64; on the CPU where the device has no such numbers (MPS)."""
    return value.double() if value.device.type != "mps" else value.cpu().double()
