"""What a model, a hook or a scheduler holds, as values that can be compared: whether anything was changed since.

Tensors are compared by place, version and values: `.data`, and tensors made under `torch.inference_mode`, can be
written to without a new version. Everything else is compared by value as far as it can be reached: attributes,
containers, the variables that a function closes over.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

_SIMPLE = {type(None), bool, int, str}
_VALUES = _SIMPLE | {float, complex, bytes, torch.dtype, torch.device, torch.Size, type}
_MOST = 500_000  # things looked at; beyond them nothing is seen
_SOME = 64  # elements of a tensor that are compared one by one, beside its norm
# large, none of a denoiser's business, and changed by nobody between two steps
_OPAQUE = ("transformers", "tokenizers", "PIL", "tqdm", "logging", "weakref", "_thread", "threading", "deqdiff_fast")


class Fingerprint:
    """Of some roots. Equal fingerprints: nothing was changed in between, as far as it can be seen.

    Args:
        only: the module that is looked into; others that are reached (a pipeline's decoder, say) count by identity.
        before: an earlier one of the same roots, whose views of the tensors are used again.
    """

    def __init__(self, *roots: Any, only: Any = None, before: Fingerprint | None = None) -> None:
        self.items: list[Any] = []
        self._tensors: list[Tensor] = []
        self._seen: set[int] = set()
        self._keep: list[Any] = []  # identities mean something while their objects live
        self._inside = set(map(id, only.modules())) if only is not None else None
        self._waiting: list[Any] = list(roots)
        while self._waiting and len(self.items) < _MOST:
            self._visit(self._waiting.pop())
        self._views: dict[Any, Tensor] = before._views if before is not None else {}
        self._numbers = self._values()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Fingerprint) or self.items != other.items:
            return False
        pairs = zip(self._numbers, other._numbers)
        return len(self._numbers) == len(other._numbers) and all(torch.equal(a, b) for a, b in pairs)

    def released(self) -> Fingerprint:
        """The same without the objects it was taken of, to be kept for longer than they live."""
        self._keep, self._tensors, self._views = [], [], {}
        return self

    __hash__ = None  # type: ignore[assignment]

    def _visit(self, value: Any) -> None:
        kind = type(value)  # a proxy says another __class__
        if kind in _VALUES:
            self.items.append(repr(value) if kind in (float, complex) else value)
            return
        mark = id(value)
        if mark in self._seen:
            self.items.append(mark)
            return
        self._seen.add(mark)
        self._keep.append(value)
        if isinstance(value, Tensor):
            self.items.append((mark, value.data_ptr() if _has_memory(value) else 0, _version(value)))
            self._tensors.append(value)
        elif issubclass(kind, torch.nn.Module):
            self.items.append(mark)
            if self._inside is None or mark in self._inside:
                self._visit_attributes(vars(value))
        else:
            self.items.append(kind if issubclass(kind, (list, tuple, dict, set)) else (kind, mark))
            if kind.__module__.split(".")[0] not in _OPAQUE:
                self._waiting.extend(_parts(value, kind))

    def _visit_attributes(self, attributes: dict[str, Any]) -> None:
        """Those of a module, of which there are thousands: what is simple at once, what is empty not at all."""
        for name, item in attributes.items():
            kind = type(item)
            if kind in _SIMPLE:
                if item is not None and item is not False:
                    self.items.append((name, item))
            elif kind in (dict, set) and not item:
                continue
            elif name in ("_parameters", "_buffers", "_modules"):
                self._waiting.extend(item.values())
                self.items.append((name, tuple(item)))
            else:
                self.items.append(name)
                self._waiting.append(item)

    def _values(self) -> list[Tensor]:
        """Numbers that say whether tensors changed: of those of a device and dtype all norms and some elements."""
        groups: dict[Any, list[Tensor]] = {}
        for tensor in self._tensors:
            if _has_memory(tensor) and tensor.numel() and tensor.layout == torch.strided:
                groups.setdefault((tensor.device, tensor.dtype), []).append(tensor.detach())
        found = []
        with torch.no_grad():
            for (_, dtype), group in groups.items():
                found.append(torch.cat([self._some_elements(tensor) for tensor in group]).cpu())
                if dtype.is_floating_point and dtype.itemsize > 1:
                    whole = torch.float32 if dtype.itemsize < 4 else dtype
                    found.append(torch.stack(torch._foreach_norm(group, 2, whole)).cpu())
                elif not dtype.is_complex:
                    found.append(torch.stack([t.to(torch.int64).sum() for t in group]).cpu())
        return [torch.nan_to_num(value) if value.is_floating_point() else value for value in found]

    def _some_elements(self, tensor: Tensor) -> Tensor:
        """Some of its elements, from all over it, (n,): a view where it is dense, to be read again."""
        place = tensor.data_ptr(), tensor.numel(), tensor.dtype
        if place not in self._views:
            view = tensor.reshape(-1)[:: max(1, tensor.numel() // _SOME)]
            if not tensor.is_contiguous():
                return view
            self._views[place] = view
        return self._views[place]


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
        with suppress(ValueError):  # not bound yet
            yield cell.cell_contents
    if "site-packages" not in function.__code__.co_filename:
        for name in function.__code__.co_names:
            item = function.__globals__.get(name)
            if not isinstance(item, (types.ModuleType, type, types.FunctionType, types.BuiltinFunctionType)):
                yield item


def _has_memory(tensor: Tensor) -> bool:
    return tensor.device.type != "meta" and type(tensor) in (Tensor, torch.nn.Parameter, torch.nn.Buffer)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else int(tensor._version)
