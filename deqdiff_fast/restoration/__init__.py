"""How measurements are let into a chain: one method a file, chosen by name or as an object with settings."""

from __future__ import annotations

from collections.abc import Callable

from .base import Method
from .ddnm import DDNM
from .ddrm import DDRM
from .diffpir import DiffPIR
from .pigdm import PiGDM

NAMED: dict[str, Callable[[], Method]] = {"ddnm": DDNM, "ddrm": DDRM, "pigdm": PiGDM, "diffpir": DiffPIR}


def resolve(method: str | Method) -> Method:
    """A method from a name or an object.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
        TypeError: neither a name nor a method object.
    """
    if isinstance(method, str):
        if method not in NAMED:
            raise ValueError(f"method: expected one of {', '.join(map(repr, NAMED))} or an object, got {method!r}")
        return NAMED[method]()
    if isinstance(method, type) or not callable(getattr(method, "restored", None)):
        raise TypeError(f"method: expected a name or an object such as DiffPIR(weight=4.0), got {method!r}")
    return method


__all__ = ["DDNM", "DDRM", "NAMED", "DiffPIR", "Method", "PiGDM", "resolve"]
