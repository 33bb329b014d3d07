"""Methods of inversion: from an image to the noise that the chain maps to it."""

from __future__ import annotations

from typing import Any

from .automatic import Automatic
from .base import InversionInfo, InversionProblem, InversionStats, Method, MethodResult
from .ddim import DDIMInversion
from .equilibrium import Equilibrium
from .fixed_point import FixedPoint
from .optimise import Optimise, OptimiseStats

NAMED: dict[str, Any] = {
    "auto": Automatic,
    "ddim": DDIMInversion,
    "equilibrium": Equilibrium,
    "fixed_point": FixedPoint,
    "gradient": Optimise,
}


def resolve(method: str | Method, options: dict[str, Any]) -> Method:
    """A method object from a name and its options, or the object itself.

    Raises:
        ValueError: an unknown name; the message lists the known ones. Or a bad option.
        TypeError: an option that the method does not have, or `method` is neither a name nor a method object.
    """
    if isinstance(method, str):
        if method not in NAMED:
            raise ValueError(
                f"method: expected one of {', '.join(map(repr, NAMED))} or a method object, got {method!r}"
            )
        known = list(NAMED[method].__dataclass_fields__)
        unknown = [name for name in options if name not in known]
        if unknown:
            raise TypeError(f"{unknown[0]}: method {method!r} has no such option; it takes {', '.join(known)}")
        resolved: Method = NAMED[method](**options)
        return resolved
    if not callable(getattr(method, "solve", None)):
        raise TypeError(f"method: expected a name or a method object, got {type(method).__name__}")
    if options:
        raise TypeError(f"{next(iter(options))}: options go to the method object itself when one is given")
    return method


__all__ = [
    "NAMED",
    "Automatic",
    "DDIMInversion",
    "Equilibrium",
    "FixedPoint",
    "InversionInfo",
    "InversionProblem",
    "InversionStats",
    "Method",
    "MethodResult",
    "Optimise",
    "OptimiseStats",
    "resolve",
]
