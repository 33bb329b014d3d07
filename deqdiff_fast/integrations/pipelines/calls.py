"""The calls of a pipeline's networks for one timestep, as they were recorded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from ..._devices import Settings
from ...model.sample_kwargs import is_list_of_strings, select_rows
from .components import SHARED, Component
from .placement import Placement
from .refusals import Unknown
from .timestep_rule import TimestepRule


@dataclass(frozen=True)
class Link:
    """An argument that is an output of an earlier call of the same step."""

    call: int
    leaf: int


@dataclass
class Call:
    """One recorded call: its input x: (R, ...), the timestep, and what else was passed, by position or by name."""

    component: Component
    x: Tensor
    timestep: Any
    extra: dict[str, Any]  # with a Link for every output of an earlier call
    positional: int  # how many of the arguments came by position
    placement: Placement | None = None
    rule: TimestepRule | None = None
    fed: bool = False  # whether it was given what the scheduler has scaled
    settings: Settings = field(default_factory=Settings.now)  # autocast may be on for this call only
    _values: list[Any] = field(default_factory=list)

    @classmethod
    def record(
        cls, component: Component, args: tuple[Any, ...], kwargs: dict[str, Any], links: dict[int, Link]
    ) -> Call:
        """The call that a pipeline makes with these arguments; links: of the tensors that others have returned.

        Raises Unknown where the model gets no input or no timestep, or more arguments than it takes.
        """
        if len(args) > len(component.names):
            raise Unknown(f"calls its {component.name} with {len(args)} arguments by position")
        given = {**dict(zip(component.names, args)), **kwargs}
        # of its own: some pipelines write into them
        extra = tree_map(lambda value: links.get(id(value), value) if isinstance(value, Tensor) else value, given)
        if lacking := [name for name in (component.names[0], component.time) if name not in extra]:
            raise Unknown(f"calls its {component.name} without {lacking[0]}")
        x, timestep = extra.pop(component.names[0]), extra.pop(component.time)
        call = cls(component, x, timestep, extra, len(args))
        call._values = [value.clone() if isinstance(value, Tensor) else value for value in tree_leaves(extra)]
        return call

    def repeat(self, x: Tensor, timestep: Any, extra: dict[str, Any]) -> Any:
        """What the network returns for other values, in the convention of this call, on which wrappers may rely."""
        named = {self.component.names[0]: x, self.component.time: timestep, **extra}
        args = tuple(named.pop(name) for name in self.component.names[: self.positional])
        with self.settings.applied():
            return self.component.module(*args, **named)

    def same_extra(self, other: Call) -> bool:
        """Whether another call passes the same conditions as this one did, which may have been written to since."""
        theirs, shape = tree_flatten(other.extra)
        alike = self.settings == other.settings and shape == tree_flatten(self.extra)[1]
        return alike and all(same_value(a, b) for a, b in zip(self._values, theirs))

    def extra_of(self, rows: Tensor, outputs: list[list[Any]]) -> dict[str, Any]:
        """What else is passed for some of the R rows: (n,) indices; outputs: the leaves of those of earlier calls."""

        total = len(self.x)

        def select(value: Any) -> Any:
            if isinstance(value, Link):
                return outputs[value.call][value.leaf]
            if isinstance(value, Tensor) and value.dim() and value.shape[0] > total and value.shape[0] % total == 0:
                return _blocks(value, total).index_select(0, rows.to(value.device)).flatten(0, 1)
            return select_rows(value, total, rows)

        own = {name: value for name, value in self.extra.items() if name not in SHARED}
        return {**self.extra, **tree_map(select, own, is_leaf=is_list_of_strings)}

    def kind(self) -> tuple[Any, ...]:
        """What calls of the same cost, and as smooth in time, have in common."""
        leaves, structure = tree_flatten(self.extra)
        shapes = (tuple(leaf.shape[1:]) if isinstance(leaf, Tensor) else repr(leaf)[:80] for leaf in leaves)
        return self.component.name, tuple(self.x.shape[1:]), str(structure), *self.settings.autocast.items(), *shapes

    def fault(self) -> str:
        """Why its rows cannot be told apart; empty if they can."""
        total = len(self.x)
        for name, value in self.extra.items():
            for leaf in () if name in SHARED else tree_leaves(value):
                if not isinstance(leaf, Tensor) or not leaf.dim() or leaf.shape[0] in (1, total):
                    continue
                if leaf.shape[0] % total or not _in_blocks(leaf, total):
                    return (
                        f"{name}: expected tensors with one row for each of the {total} rows of a model call, got "
                        f"shape {tuple(leaf.shape)}; which rows belong to which sample is not known"
                    )
        return ""


def _blocks(leaf: Tensor, total: int) -> Tensor:
    """(total * m, ...) as (total, m, ...)."""
    return leaf.reshape(total, len(leaf) // total, *leaf.shape[1:])


def _in_blocks(leaf: Tensor, total: int) -> bool:
    """Whether each of the `total` rows has a block of equal ones, one for each frame of a video."""
    blocks = _blocks(leaf, total)
    return bool((blocks == blocks[:, :1]).all())


def same_value(recorded: Any, now: Any) -> bool:
    """Whether a loop passes the same again."""
    if isinstance(recorded, Tensor) or isinstance(now, Tensor):
        alike = isinstance(recorded, Tensor) and isinstance(now, Tensor) and recorded.shape == now.shape
        return alike and torch.equal(recorded, now)
    return recorded is now or bool(recorded == now)
