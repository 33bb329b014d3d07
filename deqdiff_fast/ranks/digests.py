"""Numbers by which ranks find out whether they were called with the same things."""

from __future__ import annotations

import hashlib
import platform
import zlib
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from .._types import parameters_of
from ..kernels import available_backends
from ..model.knowledge import shared_with_model
from .row_gather import checksum


def digest(*values: Any) -> int:
    """A number of 63 bits for values of any kind: equal ones have equal numbers in every process. Objects of which only
    the class is known count by that."""
    found = hashlib.blake2b(digest_size=8)
    for value in values:
        _add(found, value)
    return int.from_bytes(found.digest(), "little") >> 1


def _add(found: Any, value: Any) -> None:
    """The value's bytes."""
    if isinstance(value, Tensor):
        found.update(repr((tuple(value.shape), value.dtype)).encode())
        plain = value.detach().cpu().contiguous().flatten()
        found.update(zlib.crc32(plain.view(torch.uint8).numpy().data).to_bytes(4, "little"))
    elif isinstance(value, torch.Generator):
        _add(found, value.get_state())
    elif isinstance(value, dict):
        for key, item in value.items():
            found.update(repr(key).encode())
            _add(found, item)
    elif isinstance(value, (list, tuple)):
        found.update(f"{len(value)}".encode())
        for item in value:
            _add(found, item)
    elif is_dataclass(value) and not isinstance(value, type):
        found.update(type(value).__qualname__.encode())
        for item in fields(value):
            _add(found, getattr(value, item.name))
    elif value is None or isinstance(value, (bool, int, float, str, bytes, torch.dtype)):
        found.update(repr(value).encode())
    else:
        found.update(f"{type(value).__module__}.{type(value).__qualname__}".encode())


def random_state(generator: Any, device: torch.device) -> Any:
    """What the noise of a solve is drawn from: the generators, else torch's own."""
    if generator is not None:
        return generator
    if device.type == "cuda":
        return torch.cuda.get_rng_state(device)
    return torch.get_rng_state()


def weights_digest(model: Any) -> int:
    """A number for the model's weights. Computed anew where they were written to."""
    weights = parameters_of(model)
    if not weights:
        return 0
    written = tuple((id(p), 0 if p.is_inference() else p._version) for p in weights)
    known = shared_with_model(model)
    last = None if known is None else known.get("weights")
    if last is None or last[0] != written:
        sums = [(k, int(checksum(p)), tuple(p.shape)) for k, p in enumerate(weights)]
        last = written, digest(sums)
        if known is not None:
            known["weights"] = last
    return int(last[1])


def software(device: torch.device) -> tuple[Any, ...]:
    """What decides the last digits of a solver's numbers."""
    what = (torch.__version__, platform.machine(), device.type, sorted(available_backends().items()))
    if device.type == "cuda":
        return (*what, torch.cuda.get_device_name(device))
    return (*what, torch.backends.cpu.get_cpu_capability(), torch.get_num_threads())
