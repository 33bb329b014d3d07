"""By what a model, a schedule and conditions are known again."""

from __future__ import annotations

import hashlib
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from .._types import Shared
from ..model.guidance import Guided
from ..schedule import Schedule


def hash_values(value: Any) -> str:
    """SHA-256, in hexadecimal, of tensors by their values, dtypes and shapes, in dicts and lists, and of what else has
    a fixed `repr`."""
    digest = hashlib.sha256()
    _add(digest, value)
    return digest.hexdigest()


def _add(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        flat = value.detach().cpu().contiguous().view(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    elif isinstance(value, dict):
        for name in sorted(value, key=str):
            digest.update(f"{name}=".encode())
            _add(digest, value[name])
    elif isinstance(value, (list, tuple)):
        digest.update(f"{len(value)}:".encode())
        for item in value:
            _add(digest, item)
    elif isinstance(value, Shared):
        _add(digest, value.value)
    elif value is None or isinstance(value, (bool, int, float, str)):
        digest.update(repr(value).encode())
    else:  # an object's `repr` may have its address in it
        digest.update(type(value).__name__.encode())


def hash_weights(model: Any) -> str | None:
    """That of all parameters and buffers of a module, of what a guided model wraps too; None where there are none."""
    if isinstance(model, Guided):
        return hash_values([hash_weights(model.model), model.scale, model.rescale])
    state = getattr(model, "state_dict", None)
    return hash_values(dict(state())) if callable(state) else None


def hash_schedule(schedule: Schedule) -> str:
    """That of its tables; its name does not count."""
    values = {field.name: getattr(schedule, field.name) for field in fields(schedule) if field.name != "name"}
    clip = values.pop("clip")
    return hash_values({**values, "clip": None if clip is None else [clip.range, clip.gain]})
