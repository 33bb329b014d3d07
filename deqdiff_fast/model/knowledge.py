"""What is learned of a model is kept with it, for all samplers of the same model."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from .._locks import Lock
from .._types import Model
from .sample_kwargs import is_dense, is_list_of_strings, is_per_sample

_SHARED: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()
_lock = Lock()


def shared_with_model(model: Model) -> dict[Any, Any] | None:
    """A dict that lives as long as the model, see `base_of`: what samplers of the same model learn, they share.

    None for a model that is neither hashed nor weakly referenced.
    """
    try:
        with _lock:
            known = _SHARED.setdefault(base_of(model), {})
            ranks = getattr(model, "deqdiff_ranks", None)  # what they all know is apart from what one of them knows
            return known if ranks is None else known.setdefault(ranks, {})
    except TypeError:
        return None


@contextmanager
def nothing_known(model: Model) -> Iterator[None]:
    """Solves in this block begin as the first ones of the model, and what they learn ends with it: their results do
    not depend on which solves were made before."""
    known = shared_with_model(model)
    if known is None:  # kept with each sampler, see `Options.unshared`
        yield
        return
    before = dict(known)
    known.clear()
    try:
        yield
    finally:
        known.clear()
        known.update(before)


def base_of(model: Model) -> Any:
    """With whom to keep what is learned of a model. A wrapper that is made anew for every use names the model that it
    wraps in `base_model`: one of ours, or one with a `deqdiff_variant`. Others may add to what they call so."""
    known = type(model).__module__.startswith("deqdiff_fast.") or hasattr(model, "deqdiff_variant")
    return getattr(model, "base_model", model) if known else model


def variant_of(model: Model) -> Any:
    """What tells a wrapper from others of the same `base_model`, the value of its `deqdiff_variant`, hashable; and
    whether a module is in training mode, where its rows may depend on each other."""
    base, variant = base_of(model), getattr(model, "deqdiff_variant", None)
    return (variant, True) if isinstance(base, nn.Module) and base.training else variant


def signature_of(noise: Tensor, model_kwargs: dict[str, Any] | None) -> Any:
    """What decides the cost of a row: the sample's shape, dtype and device, the threads, the kwargs' kinds."""
    kinds: tuple[Any, ...] = ()
    if model_kwargs:
        batch = noise.shape[0]
        leaves, structure = tree_flatten(model_kwargs, is_leaf=lambda value: is_list_of_strings(value, batch))
        kinds = (str(structure), tuple(_kind(leaf, batch) for leaf in leaves))
    threads = torch.get_num_threads() if noise.device.type == "cpu" else 0
    return tuple(noise.shape[1:]), noise.dtype, str(noise.device), threads, kinds


def _kind(leaf: Any, batch: int) -> Any:
    if isinstance(leaf, Tensor) and is_dense(leaf):
        shape = tuple(leaf.shape)
        return ("row", shape[1:], leaf.dtype) if is_per_sample(leaf, batch) else (shape, leaf.dtype)
    return leaf if isinstance(leaf, (bool, int, str, type(None))) else type(leaf).__name__
