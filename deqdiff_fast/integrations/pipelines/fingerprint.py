"""What a model, a hook or a scheduler holds, as values that can be compared: whether anything was changed since.

Tensors are compared by place, version and values: `.data`, and tensors made under `torch.inference_mode`, can be
written to without a new version. Everything else is compared by value as far as it can be reached: attributes,
containers, the variables that a function closes over.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_VALUES = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, type)
_SPREAD = 16  # elements of a tensor that are compared one by one, beside its norm
# large, none of a denoiser's business, and changed by nobody between two steps
_OPAQUE = ("transformers", "tokenizers", "PIL", "tqdm", "logging", "weakref", "_thread", "threading", "deqdiff_fast")


class Fingerprint:
    """Of some roots. Equal fingerprints: nothing was changed in between, as far as it can be seen.

    only: the module that is looked into; others that are reached (a pipeline's decoder, say) count by identity.
    """

    def __init__(self, *roots: Any, only: Any = None) -> None:
        self.items: list[Any] = []
        self._tensors: list[Tensor] = []
        self._seen: set[int] = set()
        self._keep: list[Any] = []  # identities mean something while their objects live
        self._inside = set(map(id, only.modules())) if only is not None else None
        for root in roots:
            self._walk(root)
        self._numbers = values(self._tensors)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Fingerprint) or self.items != other.items:
            return False
        pairs = zip(self._numbers, other._numbers)
        return len(self._numbers) == len(other._numbers) and all(torch.equal(a, b) for a, b in pairs)

    __hash__ = None  # type: ignore[assignment]

    def _walk(self, root: Any) -> None:
        waiting = [root]
        while waiting:
            value = waiting.pop()
            if isinstance(value, _VALUES):
                self.items.append(repr(value) if isinstance(value, (float, complex)) else value)
                continue
            kind = type(value)  # a proxy says another __class__
            if id(value) in self._seen:
                self.items.append(id(value))
                continue
            self._seen.add(id(value))
            self._keep.append(value)
            if isinstance(value, Tensor):
                self.items.append((id(value), value.data_ptr() if _has_memory(value) else 0, _version(value)))
                self._tensors.append(value)
                continue
            self.items.append((kind, id(value)) if not issubclass(kind, (list, tuple, dict, set)) else kind)
            if kind.__module__.split(".")[0] not in _OPAQUE and not self._outside(value, kind):
                waiting.extend(_parts(value, kind))

    def _outside(self, value: Any, kind: type) -> bool:
        return issubclass(kind, torch.nn.Module) and self._inside is not None and id(value) not in self._inside


def _parts(value: Any, kind: type) -> Iterator[Any]:
    """What an object holds."""
    if issubclass(kind, dict):
        for key, item in value.items():
            yield key
            yield item
    elif issubclass(kind, (list, tuple, set, frozenset)) or kind.__name__ == "deque":
        yield len(value)
        yield from value
    elif issubclass(kind, torch.Generator):
        yield bytes(value.get_state().numpy())
    elif isinstance(value, types.MethodType):
        yield value.__func__
        yield value.__self__
    elif isinstance(value, functools.partial):
        yield from (value.func, value.args, value.keywords)
    elif isinstance(value, types.FunctionType):
        yield from _of_function(value)
    elif kind.__name__ == "ndarray":
        yield value.tobytes()
    elif not isinstance(value, (types.ModuleType, types.BuiltinFunctionType, types.CodeType)):
        for name, item in getattr(value, "__dict__", {}).items():
            if item is None or item is False or (isinstance(item, (dict, set)) and not item):
                continue  # most of what every module holds
            yield name
            yield item


def _of_function(function: types.FunctionType) -> Iterator[Any]:
    """The variables that a function closes over, and the global ones of a user's own that it names."""
    yield function.__defaults__
    yield function.__dict__
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not bound yet
            yield None
    if "site-packages" not in function.__code__.co_filename:
        for name in function.__code__.co_names:
            item = function.__globals__.get(name)
            if not isinstance(item, (types.ModuleType, type, types.FunctionType, types.BuiltinFunctionType)):
                yield item


def values(tensors: list[Tensor]) -> list[Tensor]:
    """Numbers that say whether tensors changed: of those of one device and dtype all norms and some elements."""
    groups: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        if _has_memory(tensor) and tensor.numel() and tensor.layout == torch.strided:
            groups.setdefault((tensor.device, tensor.dtype), []).append(tensor.detach())
    found = []
    with torch.no_grad():
        for (_, dtype), group in groups.items():
            spread = [_spread(tensor) for tensor in group]
            found.append(torch.cat(spread).cpu())
            if dtype.is_floating_point and dtype.itemsize > 1:
                whole = torch.float32 if dtype.itemsize < 4 else dtype
                found.append(torch.stack(torch._foreach_norm(group, 2, whole)).cpu())
            elif not dtype.is_complex:
                found.append(torch.stack([t.to(torch.int64).sum() for t in group]).cpu())
    return [torch.nan_to_num(value) if value.is_floating_point() else value for value in found]


def _spread(tensor: Tensor) -> Tensor:
    """Some of its elements, from all over it: (at most _SPREAD,), all of a small one."""
    flat = tensor.reshape(-1)
    return flat[:: max(1, len(flat) // _SPREAD)][:_SPREAD] if len(flat) > 64 * _SPREAD else flat


def _has_memory(tensor: Tensor) -> bool:
    return tensor.device.type != "meta" and type(tensor) in (Tensor, torch.nn.Parameter, torch.nn.Buffer)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else int(tensor._version)
