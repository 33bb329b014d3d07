"""Launches made once for all calls of an op on tensors alike: later ones go to the compiled kernels at once.

The first call checks its arguments, chooses a backend, lays out scratch memory and has Triton bind and specialise what
a kernel takes. All of that follows from the sizes, types and alignment of the tensors and from the numbers, so the
compiled kernels are kept with their arguments, an argument's number in the place of every address.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

MOST = 256  # calls of an op that are kept; more than the rounds of a solve differ in
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


class Repeats:
    """The launches of the calls of one op."""

    def __init__(self) -> None:
        self._kept: dict[Any, list[Any]] = {}
        self.works = True
        _every.add(self)

    def run(self, args: Sequence[Any]) -> bool:
        """Launch what a call like this one has launched before; whether there was one."""
        if not self._kept or not self.works:
            return False
        try:
            key, addresses = _key(args)
            launches = self._kept.get(key)
        except (RuntimeError, TypeError):  # what has no address and what is no number: refused by the checks
            launches = None
        if launches is None:
            return False
        with torch.cuda.device_of(args[0]):
            for position, (launch, given, slots) in enumerate(launches):
                given = given.copy()
                for slot, number, offset in slots:
                    given[slot] = addresses[number] + offset
                try:
                    launch(*given)
                except TypeError:  # of a Triton whose compiled kernels take something else: before it launches
                    if position:
                        raise
                    self.works = False
                    return False
        return True

    @contextmanager
    def note(self, args: Sequence[Any]) -> Iterator[None]:
        """Keep what is launched meanwhile, unless it goes to other memory than that of the arguments."""
        launches = _noting.launches = list[Any]()
        try:
            yield
        finally:
            _noting.launches = None
        tensors = [id(arg) for arg in args if isinstance(arg, Tensor)]
        if len(set(tensors)) < len(tensors):
            return  # given twice: which of them a kernel was given is not known
        (key, _), kept = _key(args), []
        for compiled, grid, given in launches:
            slots = [(slot, *_place(value, args)) for slot, value in enumerate(given) if isinstance(value, Tensor)]
            if compiled is None or torch.version.hip or any(number is None for _, number, _ in slots):
                return  # interpreted, specialised by the size of storages too, or with memory of one call
            rest = [None if isinstance(value, Tensor) else value for value in given]
            kept.append((compiled[grid], rest, slots))
        if len(self._kept) >= MOST:
            self._kept.clear()
        if key is not None and kept:
            self._kept[key] = kept


def reset() -> None:
    """Lay out every launch anew, with other launch shapes."""
    for repeats in list(_every):
        repeats._kept.clear()


def _key(args: Sequence[Any]) -> tuple[tuple[Any, ...] | None, list[int]]:
    """Equal for calls whose launches differ in addresses alone, None where that is not known; and the addresses."""
    found, addresses = list[Any](), list[int]()
    for arg in args:
        address = 0
        if type(arg) is Tensor:
            address = arg.data_ptr()
            dense = arg.is_contiguous() and not arg.is_neg()
            found += (arg.shape, arg.dtype, arg.get_device(), address & 15, dense)
        elif isinstance(arg, Tensor):
            return None, addresses
        else:
            found.append(arg)
        addresses.append(address)
    return tuple(found), addresses


def _place(tensor: Tensor, args: Sequence[Any]) -> tuple[int | None, int]:
    """Which argument a kernel was given, and how many bytes into it, for parts of a workspace."""
    number = next((k for k, arg in enumerate(args) if arg is tensor), None)
    last, address = args[-1], tensor.data_ptr()
    if number is None and isinstance(last, Tensor) and 0 <= address - last.data_ptr() < last.nbytes:
        return len(args) - 1, address - last.data_ptr()
    return number, 0
