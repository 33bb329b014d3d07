"""What a draft sees of the model's keyword arguments: labels, pooled vectors, and maps of the sample's own shape."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._types import Shared

Pooled = dict[str, Tensor]
"""{where it stands in the arguments: labels (n,) int64, vectors (n, C), maps (n, C, *axes)}"""


@dataclass(frozen=True)
class Condition:
    """One tensor of the arguments. kind: "label", "vector" or "map". size: how many labels, or C."""

    where: str
    kind: str
    size: int


def tensors_of(values: Any, where: str = "") -> Iterator[tuple[str, Tensor]]:
    """(where, tensor) of those in nested dicts, lists and tuples, in an order that does not depend on the caller's;
    what is marked as shared is left out."""
    if isinstance(values, Tensor):
        yield where, values
    elif isinstance(values, dict):
        for key in sorted(values, key=str):
            yield from tensors_of(values[key], f"{where}.{key}" if where else str(key))
    elif isinstance(values, (list, tuple)) and not isinstance(values, Shared):
        for k, value in enumerate(values):
            yield from tensors_of(value, f"{where}.{k}")


def kind_of(value: Tensor, axes: tuple[int, ...]) -> str:
    """What a tensor of one row a sample is to a draft, "" for nothing; axes: the sample's without its channels."""
    if axes and value.dim() == 2 + len(axes) and tuple(value.shape[2:]) == axes:
        return "map"
    if value.is_floating_point() and value.dim() > 0:
        return "vector"
    if value.dim() == 1 and not value.is_complex():
        return "vector" if value.dtype == torch.bool else "label"
    return ""


def pool(kwargs: Any, rows: int, axes: tuple[int, ...]) -> Pooled:
    """The tensors among `kwargs` that have one row for each of `rows`: sequences of embeddings (n, L, C) as their mean
    over L, everything else as it is; in float32."""
    found: Pooled = {}
    for where, value in tensors_of(kwargs):
        kind = kind_of(value, axes) if value.dim() and len(value) == rows else ""
        value = value.detach()
        if kind == "label":
            found[where] = value.long()
        elif kind == "map":
            found[where] = value.float()
        elif kind:
            value = value.float().reshape(rows, 1) if value.dim() == 1 else value.float()
            found[where] = value.flatten(1, -2).mean(1) if value.dim() > 2 else value
    return found


def conditions_of(pooled: Pooled) -> tuple[Condition, ...]:
    """What there is to see in such arguments."""
    found = []
    for where, value in pooled.items():
        kind = "vector" if value.dim() == 2 else "map" if value.dim() > 2 else "label"
        size = int(value.max().clamp_min(0)) + 1 if kind == "label" else value.shape[1]
        found.append(Condition(where, kind, size))
    return tuple(found)


class ConditionEmbedding(nn.Module):
    """Labels and vectors as one sum of embeddings; what is absent adds nothing, nor does an unknown label.

    Args:
        conditions: those that may come.
        width: of the embedding.
        axes: of a sample, without its channels.
    """

    def __init__(self, conditions: tuple[Condition, ...], width: int, axes: tuple[int, ...]) -> None:
        super().__init__()
        self.conditions, self.axes = conditions, axes
        self.tables = nn.ModuleList()
        for k, condition in enumerate(conditions):
            label = condition.kind == "label"
            table = nn.Embedding(condition.size, width) if label else nn.Linear(condition.size, width, bias=False)
            nn.init.normal_(table.weight, std=0.02 if label else 1 / max(condition.size, 1) ** 0.5)
            self.tables.append(nn.Identity() if condition.kind == "map" else table)
            for name in ("mean", "scale"):
                start = torch.zeros if name == "mean" else torch.ones
                self.register_buffer(f"{name}{k}", start(0 if label else condition.size))

    def normalise_like(self, pooled: Pooled) -> None:
        """Centre and scale vectors and maps as those are; what never varies is seen as 0."""
        for k, condition in enumerate(self.conditions):
            if condition.kind != "label":
                value = pooled[condition.where].float().transpose(0, 1).flatten(1)
                std = value.std(1) if value.shape[1] > 1 else torch.zeros(len(value), device=value.device)
                self.get_buffer(f"mean{k}").copy_(value.mean(1))
                varies = std > 1e-6 * value.abs().amax(1)
                self.get_buffer(f"scale{k}").copy_(torch.where(varies, 1 / std.clamp_min(1e-30), 0))

    def forward(self, pooled: Pooled) -> Tensor | None:
        """(n, width), or None where nothing has come."""
        total: Tensor | None = None
        for k, (condition, table) in enumerate(zip(self.conditions, self.tables)):
            value = self._checked(pooled, condition)
            if value is None or condition.kind == "map":
                continue
            if condition.kind == "label":
                known = (value >= 0) & (value < condition.size)
                part = table(torch.where(known, value, 0)) * known[:, None]
            else:
                part = table(self._normalised(value, k))
            total = part if total is None else total + part
        return total

    def maps(self, pooled: Pooled, like: Tensor) -> list[Tensor]:
        """(n, C, *axes) for every map; zeros for one that is absent."""
        found = []
        for k, condition in enumerate(self.conditions):
            if condition.kind == "map":
                value = self._checked(pooled, condition)
                empty = like.new_zeros(len(like), condition.size, *self.axes)
                found.append(empty if value is None else self._normalised(value, k).to(like.dtype))
        return found

    def _normalised(self, value: Tensor, k: int) -> Tensor:
        shape = (-1, *[1] * (value.dim() - 2))
        scale = self.get_buffer(f"scale{k}")
        mean, scale = (table.view(shape) for table in (self.get_buffer(f"mean{k}"), scale))
        return (value.to(scale.dtype) - mean) * scale

    def _checked(self, pooled: Pooled, condition: Condition) -> Tensor | None:
        value = pooled.get(condition.where)
        if value is not None and condition.kind != "label" and value.shape[1] != condition.size:
            raise ValueError(
                f"model_kwargs: {condition.where}: expected {condition.size} features, as the draft was made for, got "
                f"{value.shape[1]}"
            )
        return value
