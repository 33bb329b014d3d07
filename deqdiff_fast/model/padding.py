"""A few batch sizes instead of all: what a compiled model or a graph of device work is made for."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .knowledge import base_of

EIGHTHS = (1, 2, 3, 4, 6, 8)


def padded_sizes(limit: int, batch: int) -> tuple[int, ...]:
    """The rows that a model call is made with, ascending: parts of the largest call, and one row a sample, the serial
    chain's. Padding then costs at most an eighth of the largest call, a quarter in its upper half."""
    return tuple(sorted({min(batch, limit), *(max(1, -(-limit * part // 8)) for part in EIGHTHS)}))


def is_compiled(model: Any) -> bool:
    """Whether the model, or a part of it, went through torch.compile, which specialises on batch sizes."""
    while (inner := base_of(model)) is not model:  # a wrapper of ours, around the user's model
        model = inner
    parts, seen = [model], {id(model)}
    for part in parts if isinstance(model, nn.Module) else ():  # `modules()` takes several times as long
        children = [child for child in part._modules.values() if child is not None and id(child) not in seen]
        parts += children
        seen.update(map(id, children))
    return any(
        "_torchdynamo_orig_callable" in getattr(part, "__dict__", ())
        or getattr(part, "_compiled_call_impl", None) is not None
        or (type(part).__name__ == "OptimizedModule" and type(part).__module__.startswith("torch._dynamo"))
        for part in parts
    )


def out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the host, had no room: torch raises several kinds of errors for it."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError)
        and ("out of memory" in str(error).lower() or "DefaultCPUAllocator" in str(error))
    )
