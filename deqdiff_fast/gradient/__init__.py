"""How `DEQSampler.sample` is differentiated: one mode a file, chosen by name or as an object with settings."""

from __future__ import annotations

from collections.abc import Callable

from .base import Gradient, Problem
from .implicit import Implicit
from .phantom import Phantom
from .reversible import Reversible
from .unrolled import Unrolled

NAMED: dict[str, Callable[[], Gradient]] = {
    "implicit": Implicit,
    "phantom": Phantom,
    "unrolled": Unrolled,
    "reversible": Reversible,
}


def resolve(gradient: str | Gradient) -> Gradient:
    """A gradient mode from a name or an object.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
        TypeError: neither a name nor an object with a method `attach`.
    """
    if isinstance(gradient, str):
        if gradient not in NAMED:
            raise ValueError(f"gradient: expected one of {', '.join(map(repr, NAMED))} or an object, got {gradient!r}")
        return NAMED[gradient]()
    if isinstance(gradient, type) or not callable(getattr(gradient, "attach", None)):
        raise TypeError(f"gradient: expected a name or an object such as Phantom(tau=0.1), got {gradient!r}")
    return gradient


__all__ = [
    "NAMED",
    "Gradient",
    "Implicit",
    "Phantom",
    "Problem",
    "Reversible",
    "Unrolled",
    "resolve",
]
