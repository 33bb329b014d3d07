"""Classifier-free guidance as one model: both branches of every row in one batched call."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from .._types import Model, Shared, parameters_of, unwrap_output, without_marks
from .knowledge import base_of
from .sample_kwargs import is_list_of_strings, is_whole


def guided(model: Model, cond: Any, uncond: Any, scale: float | Tensor, rescale: float = 0.0) -> Guided:
    """A model for `DEQSampler` whose prediction is u + scale (c - u), with u and c from one call on twice the rows.

    Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598, where their w is scale - 1). Differentiable with
    respect to the model's parameters, cond, uncond and a tensor scale. `max_batch` of the sampler counts rows before
    doubling; `model_kwargs` of `sample` go to both branches. Give the returned object itself to the sampler: in another
    function around it nobody can tell which row belongs to which sample.

    Args:
        model: called as model(x, t, cond) where the conditioning is a tensor, model(x, t, **cond) where it is a dict of
            keyword arguments (nested dicts and lists are fine); rows are ordered [uncond, cond].
        cond, uncond: tensors, or dicts with the same keys. A tensor has one row for each sample, (B, ...), or one row
            for all of them, (1, ...); the two branches agree in everything but values. Anything that is not a tensor
            must be equal in both and is passed on.
        scale: the guidance scale, a number or (B,), one for each sample; at exactly 1 the unconditional branch is not
            evaluated.
        rescale: guidance_rescale phi in [0, 1] (Lin et al. 2023, arXiv 2305.08891, section 3.4): the result's standard
            deviation over each sample moves by phi towards that of c.

    Raises:
        TypeError, ValueError: a bad argument, by name.
    """
    return Guided(model, cond, uncond, scale, rescale)


@dataclass(frozen=True, eq=False)
class _Layout:
    """How to put a branch's arguments together again. An opaque leaf for the sampler: nothing in it is per sample."""

    structure: TreeSpec
    constants: tuple[Any, ...]  # the leaves that are no tensors; `_ROW`, `_SHARED` where a tensor goes


_ROW, _SHARED = object(), object()  # a tensor with one row for each sample; one without


class Guided:
    """See `guided`."""

    def __init__(self, model: Model, cond: Any, uncond: Any, scale: float | Tensor, rescale: float) -> None:
        if not callable(model):
            raise TypeError(f"model: expected a callable model(x, t, ...), got {type(model).__name__}")
        for name, value in (("cond", cond), ("uncond", uncond)):
            if not isinstance(value, (Tensor, dict)):
                raise TypeError(
                    f"{name}: expected a tensor or a dict of keyword arguments, got {type(value).__name__}; a "
                    "branch without conditioning still needs what the model takes in its place, say zeros"
                )
        if isinstance(cond, Tensor) != isinstance(uncond, Tensor):
            kinds = f"{type(cond).__name__} and {type(uncond).__name__}"
            raise TypeError(f"cond, uncond: expected two tensors or two dicts, got {kinds}")
        uncond = _in_order_of(cond, uncond)
        _check_pair(cond, uncond)
        self.model, self.cond, self.uncond = model, cond, uncond
        self.base_model = base_of(model)  # what a planner learns outlives this object
        self._marked = getattr(model, "takes_marks", False)  # it tells what has a row for each of x by itself
        self.scale, self.rescale = _check_scale(scale), _check_rescale(rescale)

    def parameters(self) -> list[Tensor]:
        """The parameters of the model, where it is a module: what a sample can be differentiated with respect to."""
        return parameters_of(self.model)

    @property
    def deqdiff_ranks(self) -> Any:
        """The ranks that the model's rows are shared out over, None without any."""
        return getattr(self.model, "deqdiff_ranks", None)

    def conditioning_tensors(self) -> list[Tensor]:
        """The tensors that `bind_batch` adds to a call, for whoever wants to know whether they need a gradient."""
        leaves = tree_leaves((self.cond, self.uncond, self.scale))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def bind_batch(self, batch: int, extra: dict[str, Any]) -> dict[str, Any]:
        """The keyword arguments for `batch` samples, every tensor in them with one row for each: for the sampler.

        extra: the caller's `model_kwargs`, of which what has `batch` rows is per sample. Raises ValueError.
        """
        branches = [{"": value} if isinstance(value, Tensor) else value for value in (self.uncond, self.cond)]
        taken = sorted(set(extra) & set(branches[0]))
        if taken:
            raise ValueError(f"model_kwargs: {', '.join(taken)} is given in cond and uncond already")
        whole = partial(is_whole, batch=batch)
        inside = len(tree_leaves(branches[0], whole))  # dicts keep their order: these come before those of `extra`
        (low, structure), (high, _) = (tree_flatten({**branch, **extra}, whole) for branch in branches)
        rows, shared, constants = [], [], []
        for k, (u, c) in enumerate(zip(low, high)):
            if isinstance(u, Tensor) and u.dim() > 0 and (k < inside or u.shape[0] == batch):
                rows.append((_repeat(u, batch), _repeat(c, batch)))
                constants.append(_ROW)
            elif is_list_of_strings(u, batch):
                rows.append((u, c))
                constants.append(_ROW)
            elif isinstance(u, (Tensor, Shared)):
                shared.append(u)
                constants.append(_SHARED)
            else:
                constants.append(u)
        layout = _Layout(structure, tuple(constants))
        bound: dict[str, Any] = {"rows": rows, "shared": shared, "layout": layout}
        if isinstance(self.scale, Tensor):
            if len(self.scale) not in (1, batch):
                raise ValueError(f"scale: expected a number or {batch}, one for each sample, got {len(self.scale)}")
            bound["scale"] = self.scale.expand(batch)
        return bound

    def __call__(self, x: Tensor, t: Tensor, *, layout: Any = None, **given: Any) -> Tensor:
        """The guided prediction for x: (n, *shape), t: (n,). Without the sampler the rows are the samples."""
        if layout is None:
            bound = self.bind_batch(len(x), given)
            layout, given = bound.pop("layout"), without_marks(bound)
        scale = given.get("scale", self.scale)
        args, kwargs = given["joined"] if "joined" in given else self.joined(layout=layout, **given)["joined"]
        if not isinstance(scale, Tensor) and scale == 1.0:
            return self._call(x, t, args, kwargs)
        low, high = self._call(torch.cat([x, x]), torch.cat([t, t]), args, kwargs).chunk(2)
        if isinstance(scale, Tensor):
            scale = scale.to(low.dtype).view(-1, *[1] * (low.dim() - 1))
        return combine(low, high, scale, self.rescale)

    def joined(self, *, layout: Any, **given: Any) -> dict[str, Any]:
        """What `bind_batch` returned, with the model's own arguments for both branches, for calls on the same rows."""
        rows, shared, scale = given["rows"], given["shared"], given.get("scale", self.scale)
        one = not isinstance(scale, Tensor) and scale == 1.0
        both = [c if one else torch.cat([u, c]) if isinstance(u, Tensor) else u + c for u, c in rows]
        plain = without_marks(shared) if shared else ()
        leaves = {_ROW: iter(both), _SHARED: map(Shared, plain) if self._marked else iter(plain)}
        values = [next(leaves[value]) if value is _ROW or value is _SHARED else value for value in layout.constants]
        kwargs: dict[str, Any] = tree_unflatten(values, layout.structure)
        return {"layout": layout, **given, "joined": ([kwargs.pop("")] if "" in kwargs else [], kwargs)}

    def _call(self, x: Tensor, t: Tensor, args: list[Any], kwargs: dict[str, Any]) -> Tensor:
        value = unwrap_output(self.model(x, t, *args, **kwargs))
        if not isinstance(value, Tensor) or value.dim() == 0 or value.shape[0] != x.shape[0]:
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"model: expected a tensor of {len(x)} rows or an object with .sample, got {got}")
        return value


def combine(negative: Tensor, positive: Tensor, scale: float | Tensor, rescale: float) -> Tensor:
    """negative + scale (positive - negative), each (n, *shape), as diffusers computes it (Ho and Salimans 2022, arXiv
    2207.12598); its standard deviation over each sample moved by `rescale` towards that of `positive` (Lin et al. 2023,
    arXiv 2305.08891, section 3.4)."""
    guided = negative + scale * (positive - negative)
    if rescale > 0.0:
        axes = tuple(range(1, guided.dim()))
        ratio = positive.std(dim=axes, keepdim=True) / guided.std(dim=axes, keepdim=True)
        guided = rescale * (guided * ratio) + (1 - rescale) * guided
    return guided


def _repeat(value: Tensor, batch: int) -> Tensor:
    if value.shape[0] == batch:
        return value
    if value.shape[0] != 1:
        raise ValueError(
            f"cond, uncond: expected tensors of {batch} rows, one for each sample, or of one row, got shape "
            f"{tuple(value.shape)}; give the object that guided(...) returns to the sampler itself, not a function "
            "around it"
        )
    return value.expand(batch, *value.shape[1:])


def _in_order_of(cond: Any, uncond: Any) -> Any:
    """`uncond` with its dicts in the order of those of `cond`, where the keys agree."""
    if isinstance(cond, dict) and isinstance(uncond, dict) and set(cond) == set(uncond):
        return {key: _in_order_of(value, uncond[key]) for key, value in cond.items()}
    return uncond


def _check_pair(cond: Any, uncond: Any) -> None:
    """Raise unless the two branches can be one batch."""
    whole = lambda value: isinstance(value, Shared)  # noqa: E731
    (high, above), (low, below) = tree_flatten(cond, whole), tree_flatten(uncond, whole)
    if above != below:
        keys = [sorted(value) if isinstance(value, dict) else "a tensor" for value in (cond, uncond)]
        raise ValueError(f"cond, uncond: expected the same keys and nesting in both, got {keys[0]} and {keys[1]}")
    for c, u in zip(high, low):
        if isinstance(c, Tensor) != isinstance(u, Tensor):
            raise ValueError("cond, uncond: expected a tensor in both or in neither, got a tensor in one of them")
        if not isinstance(c, Tensor):
            if c != u:
                raise ValueError(f"cond, uncond: expected equal values of what is not a tensor, got {c!r} and {u!r}")
        elif c.shape[1:] != u.shape[1:] or c.dim() != u.dim():
            shapes = f"{tuple(c.shape)} and {tuple(u.shape)}"
            raise ValueError(f"cond, uncond: expected equal shapes but for the rows, got {shapes}; pad the shorter one")
        elif (c.dtype, c.device) != (u.dtype, u.device):
            kinds = f"{c.dtype} on {c.device} and {u.dtype} on {u.device}"
            raise ValueError(f"cond, uncond: expected one dtype and device, got {kinds}")
        elif c.dim() == 0 and not torch.equal(c, u):
            raise ValueError("cond, uncond: expected equal tensors without dimensions, or one value for each sample")


def _check_scale(scale: Any) -> float | Tensor:
    if isinstance(scale, Tensor) and scale.dim() == 1 and len(scale) > 0 and scale.is_floating_point():
        return scale
    number = scale.item() if isinstance(scale, Tensor) and scale.numel() == 1 and not scale.requires_grad else scale
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number):
        got = f"a tensor of shape {tuple(scale.shape)}" if isinstance(scale, Tensor) else repr(scale)
        raise ValueError(f"scale: expected a finite number or a floating-point tensor (B,), got {got}")
    return float(number)


def _check_rescale(rescale: Any) -> float:
    if isinstance(rescale, bool) or not isinstance(rescale, (int, float)) or not 0 <= rescale <= 1:
        raise ValueError(f"rescale: expected a number from 0 to 1, got {rescale!r}")
    return float(rescale)
