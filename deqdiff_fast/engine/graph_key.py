"""What a recording depends on besides the values in its memory: another one is made where any of it is another."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import CellType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from .._devices import users_autocast
from .system import System

DEPTH = 4  # wrappers around wrappers
_EMPTY = CellType()


def solve_key(system: System, settings: tuple[Any, ...]) -> tuple[Any, ...]:
    """Shapes, dtypes and settings of a solve, and of torch."""
    leaves, structure = tree_flatten(system.model_kwargs)
    shapes = tuple((tuple(x.shape), x.dtype, x.device) if isinstance(x, Tensor) else (type(x), repr(x)) for x in leaves)
    autocast = users_autocast(system.device.type)
    matmul = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", None) or matmul.allow_tf32  # the first is torch's since 2.9
    return (
        system.batch, system.shape, system.model_dtype, system.device, system.max_batch, str(structure), shapes,
        autocast, precision, torch.is_inference_mode_enabled(), system.basis is None, settings,
    )  # fmt: skip


@dataclass(frozen=True)
class Weights:
    """A model's weights, where they lie and how often each was written to.

    Versions count although a graph reads the weights as they are: a model may have computed something from them. Those
    of buffers are apart: a model may write to them itself.
    """

    places: int
    """A hash of it all but the versions of buffers."""
    buffers: tuple[Tensor, ...]

    @classmethod
    def of(cls, model: Any) -> Weights | None:
        """None where they have no address."""
        parts = {id(part): part for module in _modules(model) for part in module.modules()}.values()
        weights = {id(x): x for part in parts for x in part._parameters.values() if x is not None}
        buffers = {id(x): x for part in parts for x in part._buffers.values() if x is not None}
        training = tuple(part.training for part in parts)
        try:
            places = [(x.data_ptr(), x.dtype, x.shape, x.stride()) for x in (*weights.values(), *buffers.values())]
        except (RuntimeError, NotImplementedError):
            return None
        if not all(place[0] or 0 in place[2] for place in places):
            return None
        return cls(hash((*places, training, _versions(weights.values()))), tuple(buffers.values()))

    def key(self) -> tuple[int, int]:
        """As they are now, where nobody but the model itself has written to them."""
        return self.places, hash(_versions(self.buffers))


class SolveKey(NamedTuple):
    """What a solve's recordings depend on."""

    settings: tuple[Any, ...]
    weights: Weights

    def now(self) -> tuple[Any, ...]:
        """To be found again under: before the solve, and after it."""
        return self.settings, self.weights.key()


def _versions(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    return tuple(0 if x.is_inference() else x._version for x in tensors)


def _modules(model: Any) -> list[nn.Module]:
    """The modules that a callable calls, as far as can be told."""
    found: dict[int, nn.Module] = {}
    held = [model] if isinstance(model, nn.Module) else [model, *getattr(model, "__dict__", {}).values()]
    for _ in range(DEPTH):
        found |= {id(part): part for part in held if isinstance(part, nn.Module)}
        held = [inner for part in held if not isinstance(part, nn.Module) for inner in _called_by(part)]
    return list(found.values())


def _called_by(function: Any) -> Iterator[Any]:
    """What a wrapper, a method, a partial or a closure may call."""
    for name in ("base_model", "__self__", "__wrapped__"):
        yield getattr(function, name, None)
    if isinstance(function, functools.partial):
        yield from (function.func, *function.args, *function.keywords.values())
    cells = getattr(function, "__closure__", None) or ()
    yield from (cell.cell_contents for cell in cells if cell != _EMPTY)
