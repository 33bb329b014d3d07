"""Launches made once for all calls of an op on tensors alike: later ones go to the compiled kernels at once.

The first call checks its arguments, chooses a backend, lays out scratch memory and has Triton bind and specialise what
a kernel takes. All of that follows from the sizes, types and alignment of the tensors and from the numbers, so the
compiled kernels are kept with their arguments, an argument's number in the place of every address. What is looked at in
every call is looked at by C functions mapped over all tensors: a round's time on the host is this.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter, is_, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

MOST = 256  # calls of an op that are kept; more than the rounds of a solve differ in
LAYOUTS = 8  # of tensors, of each of them
Pick = Callable[[Sequence[Any]], tuple[Any, ...]]
_shape, _dtype = attrgetter("shape"), attrgetter("dtype")
_noting = threading.local()
_every: weakref.WeakSet[Repeats] = weakref.WeakSet()


def launcher(kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
    """`kernel[grid]`, noted where `Repeats` wants to know."""

    def launch(*args: Any, **named: Any) -> None:
        compiled = kernel[grid](*args, **named)
        launches = getattr(_noting, "launches", None)
        if launches is not None:
            rest = (named[name] for name in kernel.arg_names[len(args) :])
            launches.append((compiled, (*grid, 1, 1)[:3], [*args, *rest]))

    return launch


class Kept(NamedTuple):
    """The launches of a call: for each a compiled kernel on its grid, and how it picks its arguments out of the list of
    addresses, constants and places in the workspace."""

    layout: tuple[Any, ...]
    constants: list[Any]
    offsets: list[int]
    launches: list[tuple[Callable[..., None], Pick]]


class Repeats:
    """The launches of the calls of one op."""

    def __init__(self) -> None:
        self._pick: dict[Any, tuple[Pick, Pick]] = {}
        """Tensors and numbers of the arguments, by the types of these."""
        self._kept: dict[Any, list[Kept]] = {}
        """By types and numbers; of tensors of another layout behind each other, those of the last call first."""
        self.works = True
        _every.add(self)

    def run(self, args: Sequence[Any]) -> bool:
        """Launch what a call like this one has launched before; whether there was one."""
        types = tuple(map(type, args))
        pick = self._pick.get(types)
        if pick is None or not self.works:
            return False
        tensors = pick[0](args)
        try:
            addresses = [*map(Tensor.data_ptr, tensors)]
            candidates = self._kept.get((types, pick[1](args)), ())
            layout = self._layout_with(tensors, addresses, args[-1])
        except (RuntimeError, TypeError):  # what has no address and what is no number: refused by the checks
            return False
        for kept in candidates:
            if kept.layout is layout or kept.layout == layout:
                break
        else:
            return False
        values = [*addresses, *kept.constants, *[addresses[-1] + offset for offset in kept.offsets]]
        done = 0
        try:
            with torch.cuda.device_of(args[0]):
                for launch, chosen in kept.launches:
                    launch(*chosen(values))
                    done += 1
        except TypeError:  # of a Triton whose compiled kernels take something else: before it launches
            if done:
                raise
            self.works = False
            return False
        return True

    def _layout_with(self, tensors: Sequence[Tensor], addresses: list[int], last: Any) -> tuple[Any, ...]:
        """`_layout` of the tensors; a workspace remembers that of the tensors that it came with.

        They are the same objects in every round of a solve, and an object keeps its type, device and strides as long as
        it keeps its address and shape. It remembers them itself, so that they are gone when the solve's memory is.
        """
        if last is not tensors[-1] or last.dtype is not torch.uint8:
            return _layout(tensors, addresses)
        shapes, known = [*map(_shape, tensors)], last.__dict__.setdefault("_came_with", {})
        if self in known:
            before = known[self]
            if before[0] == addresses and before[1] == shapes and all(map(is_, before[2], tensors)):
                return before[3]
        layout = _layout(tensors, addresses)
        known[self] = addresses, shapes, tensors[:-1], layout
        return layout

    @contextmanager
    def note(self, args: Sequence[Any]) -> Iterator[None]:
        """Keep what is launched meanwhile, unless it goes to other memory than that of the arguments."""
        launches = _noting.launches = list[Any]()
        try:
            yield
        finally:
            _noting.launches = None
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        if len({*map(id, tensors)}) < len(tensors):
            return  # given twice: which of them a kernel was given is not known
        if not launches or any(type(tensor) is not Tensor for tensor in tensors):
            return
        found, constants, offsets = list[Any](), list[Any](), list[int]()
        for compiled, grid, given in launches:
            order = [_place(value, tensors, args[-1], constants, offsets) for value in given]
            if compiled is None or torch.version.hip or None in order:
                return  # interpreted, specialised by the size of storages too, or with memory of one call
            found.append((compiled[grid], _picker(order)))
        kept = Kept(_layout(tensors, [*map(Tensor.data_ptr, tensors)]), constants, offsets, found)
        self._keep(tuple(map(type, args)), args, kept)

    def _keep(self, types: tuple[type, ...], args: Sequence[Any], kept: Kept) -> None:
        of_tensors = [position for position, kind in enumerate(types) if kind is Tensor]
        numbers = [position for position, kind in enumerate(types) if kind is not Tensor]
        pick = self._pick.setdefault(types, (_picker(of_tensors), _picker(numbers)))
        if len(self._kept) >= MOST:
            self._kept.clear()
        key = types, pick[1](args)
        self._kept[key] = [kept, *self._kept.get(key, [])][:LAYOUTS]


def reset() -> None:
    """Lay out every launch anew, with other launch shapes."""
    for repeats in list(_every):
        repeats._kept.clear()


def _layout(tensors: Sequence[Tensor], addresses: Sequence[int]) -> tuple[Any, ...]:
    """Equal for tensors on which launches differ in addresses alone."""
    return (
        *map(_shape, tensors), *map(_dtype, tensors), *map(Tensor.get_device, tensors),
        *map(Tensor.is_contiguous, tensors), *map(Tensor.is_neg, tensors), *[address & 15 for address in addresses],
    )  # fmt: skip


def _place(
    value: Any, tensors: Sequence[Tensor], last: Any, constants: list[Any], offsets: list[int]
) -> int | None:  # fmt: skip
    """Where a kernel's argument is in the list of addresses, constants and places in the workspace, which is the `last`
    of the tensors, if any; None for a tensor that is elsewhere. Constants and places are added."""
    if not isinstance(value, Tensor):
        constants.append(value)
        return len(tensors) + len(constants) - 1
    for number, tensor in enumerate(tensors):
        if tensor is value:
            return number
    if isinstance(last, Tensor) and 0 <= value.data_ptr() - last.data_ptr() < last.nbytes:
        offsets.insert(0, value.data_ptr() - last.data_ptr())
        return -len(offsets)
    return None


def _picker(order: Sequence[int]) -> Pick:
    """What takes these entries out of a sequence."""
    if len(order) > 1:
        return itemgetter(*order)
    return lambda values: tuple(values[k] for k in order)
