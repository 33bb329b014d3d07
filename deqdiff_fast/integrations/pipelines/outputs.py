"""Random numbers in the place of what networks return, in its shape."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from ..._types import unwrap_output
from .calls import Call, Link
from .placement import locate
from .proxies import Output

_LARGE = 32.0  # times normal: of every second step, and one over that in the others, so that a bound is met


@dataclass(frozen=True)
class OutputShape:
    """Of what a network returns for R rows."""

    structure: TreeSpec
    leaves: tuple[Any, ...]  # (rows for each of R, further shape, dtype) in the place of tensors

    @classmethod
    def of(cls, output: Any, rows: int) -> OutputShape | None:
        """None: it has no rows."""
        if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(output)):
            output = Output(sample=unwrap_output(output))
        leaves, structure = tree_flatten(output)
        shapes = []
        for leaf in leaves:
            if isinstance(leaf, Tensor) and (not leaf.dim() or leaf.shape[0] % rows):
                return None
            tensor = isinstance(leaf, Tensor)
            shapes.append((leaf.shape[0] // rows, tuple(leaf.shape[1:]), leaf.dtype) if tensor else leaf)
        return cls(structure, tuple(shapes))

    def draw(self, rows: int, like: Tensor, index: int, number: int) -> Any:
        """The same numbers for call `number` of step `index`. Rows have something in common, and more of it in every
        second step, so that what depends on norms of outputs, or on products of them, is another in every step."""
        own, common = (torch.Generator("cpu").manual_seed(seed) for seed in (64 * index + number + 1, index))
        size, apart = (1 / _LARGE, 0.5) if index % 2 else (_LARGE, 1.0)

        def drawn(each: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            value = apart * torch.randn((each * rows, *shape), generator=own, device="cpu")
            return (size * (value + torch.randn(shape, generator=common, device="cpu"))).to(like.device, dtype)

        values = [drawn(*leaf) if isinstance(leaf, tuple) else leaf for leaf in self.leaves]
        return tree_unflatten(values, self.structure)


_SHAPES: WeakKeyDictionary[Any, dict[Any, OutputShape]] = WeakKeyDictionary()  # of networks: those that were seen


class StepOutputs:
    """What the loop is given for the calls of step `index`; networks are called only where it is not known yet what
    they return, with the loop's own arguments."""

    def __init__(self, index: int = 0, earlier: tuple[Any, ...] = ()) -> None:
        self.index, self.earlier = index, earlier  # of the last step: what the loop was given, and what it made of that
        self.given: list[Any] = []
        self.links: dict[int, Link] = {}  # of what auxiliary networks returned
        self._real: list[Any] = []
        self._calls: list[Call] = []

    def next(self, call: Call) -> Any:
        """For one more call, whose x is real by now; None where the network returns something else than rows."""
        number = len(self.given)
        self._calls.append(call)
        self._real.append(None)
        known = _SHAPES.setdefault(call.component.module, {})
        kind = (*call.kind(), call.x.dtype)
        if kind not in known:
            shape = OutputShape.of(self.real(number), len(call.x))
            if shape is None or not (call.component.auxiliary or isinstance(unwrap_output(self.real(number)), Tensor)):
                return None
            known[kind] = shape
        output = known[kind].draw(len(call.x), call.x, self.index, number)
        self.given.append(output if call.component.auxiliary else copy.deepcopy(output))  # loops write into theirs
        if call.component.auxiliary:
            leaves = enumerate(tree_leaves(output))
            self.links |= {id(leaf): Link(number, k) for k, leaf in leaves if isinstance(leaf, Tensor)}
        return output

    def real(self, number: int) -> Any:
        """What the network itself returns for a call; it is asked once."""
        call = self._calls[number]
        if self._real[number] is None:
            before = enumerate(self._calls[:number])
            earlier = [tree_leaves(self.real(k)) if c.component.auxiliary else [] for k, c in before]
            rows = torch.arange(len(call.x), device=call.x.device)
            self._real[number] = call.repeat(call.x, call.timestep, call.extra_of(rows, earlier))
        return self._real[number]

    def reused(self, *values: Any) -> bool:
        """Whether one of these is, or holds, what the loop was given in the last step, or has made of that."""
        both = ([x for x in tree_leaves(each) if isinstance(x, Tensor) and x.dim()] for each in (values, self.earlier))
        found = itertools.starmap(locate, itertools.product(*both))
        return any(placement is not None and placement.mask is None for placement in found)

    def unused(self) -> bool:
        """Whether something that an auxiliary network returned went elsewhere than into later calls as it is."""
        used = {leaf for call in self._calls for leaf in tree_leaves(call.extra) if isinstance(leaf, Link)}
        return any(link not in used for link in self.links.values())
