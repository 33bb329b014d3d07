"""What a recording depends on besides the values in its memory: another one is made where any of it is another."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from types import CellType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from .system import System

DEPTH = 4  # wrappers around wrappers
_EMPTY = CellType()


def solve_key(system: System, settings: tuple[Any, ...]) -> tuple[Any, ...]:
    """Shapes, dtypes and settings of a solve, and of torch."""
    leaves, structure = tree_flatten(system.model_kwargs)
    shapes = tuple((tuple(x.shape), x.dtype, x.device) if isinstance(x, Tensor) else (type(x), repr(x)) for x in leaves)
    device = system.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    matmul = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", None) or matmul.allow_tf32  # the first is torch's since 2.9
    return (
        system.batch, system.shape, system.model_dtype, system.device, system.max_batch, str(structure), shapes,
        autocast, precision, torch.is_inference_mode_enabled(), settings,
    )  # fmt: skip


def weights_key(model: Any) -> tuple[int, int] | None:
    """Where a model's weights lie and how often each was written to; the second number is the buffers' part of it,
    which a model may write to itself. None where they have no address.

    Versions count although a graph reads the weights as they are: a model may have computed something from them.
    """
    modules = _modules(model)
    weights = [weight for module in modules for weight in module.parameters()]
    buffers = [buffer for module in modules for buffer in module.buffers()]
    training = tuple(part.training for module in modules for part in module.modules())
    try:
        places = tuple((x.data_ptr(), x.dtype, x.device, tuple(x.shape), x.stride()) for x in (*weights, *buffers))
    except (RuntimeError, NotImplementedError):
        return None
    if any(place[0] == 0 and x.numel() for place, x in zip(places, (*weights, *buffers))):
        return None
    return hash((places, training, _versions(weights))), hash(_versions(buffers))


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
