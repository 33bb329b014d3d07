"""Races of Triton kernels, found by interpreting them: programs in random order, every access noted.

Programs of one launch run in any order and at the same time, and so do the threads of a program between barriers. So in
a launch no byte is written by one program and accessed by another. In a program, none is written twice without a
barrier in between, nor read after it was written, nor written by one thread when another one has read it. Which thread
an element of a block belongs to is not known here: every load and store has a layout of its own. What is written at the
place in the block where it was read, in a block of the same shape, is taken to be in order. Nothing is accessed outside
of the tensors that a kernel was given.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

CHECKED: set[str] = set()
"""Names of the kernels of which a launch was checked."""


class Access(NamedTuple):
    """A block that a program loads or stores; addresses in bytes, places in the block of those that are not masked."""

    program: int
    barriers: int
    wrote: bool
    shape: int
    width: int
    address: Any
    place: Any

    def columns(self, unit: int, time: int) -> list[Any]:
        """Program, barriers, whether written, shape, place, address in units and time, of all units accessed."""
        address = (self.address[:, None] // unit + np.arange(self.width // unit)).ravel()
        place = np.repeat(self.place, self.width // unit)
        values = self.program, self.barriers, self.wrote, self.shape, place, address, time
        return [np.broadcast_to(value, address.shape) for value in values]


@dataclass
class Launch:
    """One launch of a kernel, and what its programs did."""

    kernel: str
    tensors: list[Tensor]
    program: int = 0
    barriers: int = 0
    accesses: list[Access] = field(default_factory=list)
    shapes: dict[tuple[int, ...], int] = field(default_factory=dict)

    def note(self, pointers: Any, mask: Any, width: int, wrote: bool) -> None:
        """An access through a block of pointers, as far as the mask goes."""
        shape = self.shapes.setdefault(np.shape(pointers), len(self.shapes))
        place = np.flatnonzero(np.broadcast_to(mask, np.shape(pointers)))
        address = np.ravel(pointers)[place].astype(np.int64)
        self.accesses.append(Access(self.program, self.barriers, wrote, shape, width, address, place))

    def faults(self) -> list[str]:
        """What is wrong, in words."""
        return [f"{self.kernel}: {said}" for said in (*self._outside(), *self._conflicts())]

    def _outside(self) -> list[str]:
        """Accesses outside of the tensors."""
        extents = []
        for tensor in self.tensors:
            elements = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride()))
            size = elements * tensor.element_size() if tensor.numel() else 0
            extents.append((tensor.data_ptr(), tensor.data_ptr() + size))
        start, end = np.array(sorted(extents)).reshape(-1, 2).T
        end = np.maximum.accumulate(end)
        found = []
        for access in self.accesses:
            at = np.searchsorted(start, access.address, side="right") - 1
            wrong = int(((at < 0) | (access.address + access.width > end[at])).sum())
            if wrong:
                verb = "writes" if access.wrote else "reads"
                found.append(f"program {access.program} {verb} {wrong} elements outside of its tensors")
        return found

    def _conflicts(self) -> list[str]:
        """Accesses of one address, a write among them, that nothing keeps apart."""
        if not self.accesses:
            return []
        unit = min(access.width for access in self.accesses)
        columns = zip(*(access.columns(unit, time) for time, access in enumerate(self.accesses)))
        program, barriers, wrote, shape, place, address, time = map(np.concatenate, columns)
        here, phases = Groups(address), barriers.max() + 1
        phase = Groups((here.number * (program.max() + 1) + program) * phases + barriers)
        shared, several = (here.sum(wrote) > 0) & here.differ(program), phase.differ(place) | phase.differ(shape)
        first, last = phase.least(np.where(wrote, time, len(self.accesses))), -phase.least(np.where(wrote, 0, -time))
        complaints = {
            "are accessed by several programs and written by one": shared,
            "are written twice by a program without a barrier": phase.sum(wrote) > 1,
            "are read after they were written without a barrier": last > first,
            "are accessed by several threads and written by one without a barrier": (phase.sum(wrote) > 0) & several,
        }
        return [f"{int(wrong.sum())} places {said}" for said, wrong in complaints.items() if wrong.any()]


class Groups:
    """Entries with equal keys."""

    def __init__(self, keys: Any) -> None:
        _, self.first, self.number = np.unique(keys, return_index=True, return_inverse=True)

    def sum(self, values: Any) -> Any:
        """Of each group."""
        return np.bincount(self.number, values)

    def least(self, values: Any) -> Any:
        """Of each group."""
        order = np.argsort(self.number, kind="stable")
        return np.minimum.reduceat(values[order], np.cumsum(np.bincount(self.number)) - np.bincount(self.number))

    def differ(self, values: Any) -> Any:
        """Whether values within each group differ."""
        return self.sum(values != values[self.first][self.number]) > 0


def install(interpreter: Any, seed: int = 0) -> None:
    """Run the programs of every launch in random order, and raise AssertionError for what is wrong.

    interpreter: `triton.runtime.interpreter`.
    """
    builder, executor, draw = interpreter.interpreter_builder, interpreter.GridExecutor, random.Random(seed)
    kind, launch = type(builder), executor.__call__
    load, store = kind.create_masked_load, kind.create_masked_store
    place, grid, barrier = kind.set_grid_idx, kind.set_grid_dim, kind.create_barrier
    running: list[Launch] = []
    orders: list[list[list[int]]] = [[]]

    def width(pointers: Any) -> int:
        return int(np.dtype(interpreter._get_np_dtype(pointers.get_element_ty())).itemsize)

    def noted_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        running[-1].note(pointers.data, mask.data, width(pointers), False)
        return load(self, pointers, mask, *rest)

    def noted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        running[-1].note(pointers.data, mask.data, width(pointers), True)
        return store(self, pointers, value, mask, *rest)

    def shuffled_grid(self: Any, *sizes: int) -> None:
        orders[0] = [draw.sample(range(n), n) for n in sizes]
        grid(self, *sizes)

    def shuffled_place(self: Any, *index: int) -> None:
        running[-1].program, running[-1].barriers = running[-1].program + 1, 0
        place(self, *(order[k] for order, k in zip(orders[0], index)))

    def counted_barrier(self: Any) -> Any:
        running[-1].barriers += 1
        return barrier(self)

    def checked_launch(self: Any, *args: Any, **named: Any) -> None:
        tensors = [value for value in (*args, *named.values()) if isinstance(value, Tensor)]
        running.append(Launch(self.fn.__name__, tensors))
        try:
            launch(self, *args, **named)
            faults = running[-1].faults()
        finally:
            running.pop()
        assert not faults, "\n".join(faults)
        CHECKED.add(self.fn.__name__)

    for owner, name, value in (
        (kind, "create_masked_load", noted_load), (kind, "create_masked_store", noted_store),
        (kind, "set_grid_dim", shuffled_grid), (kind, "set_grid_idx", shuffled_place),
        (kind, "create_barrier", counted_barrier), (executor, "__call__", checked_launch),
    ):  # fmt: skip
        setattr(owner, name, value)
