"""Values that belong to the samples of a batch: which they are, and their rows."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_map

from .._types import Shared, shared

_log = logging.getLogger("deqdiff_fast")
_told: set[str] = set()  # what was said of a guess already
_INNER = (dict, list, tuple, Shared)
_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)  # whose vectors index_select does not take
_LARGE = 2**20  # bytes of one sample, of which copies for every timestep are worth a word


def is_list_of_strings(value: Any, batch: int | None = None) -> bool:
    """Whether it is a list or tuple of strings, `batch` of them (None: any number): prompts, one for each sample."""
    listed = type(value) in (list, tuple) and all(isinstance(item, str) for item in value)
    return listed and len(value) > 0 and (batch is None or len(value) == batch)


def is_per_sample(value: Any, batch: int) -> bool:
    """Whether it is a tensor of first dimension `batch`, or a list of as many strings."""
    if isinstance(value, Tensor):
        return value.dim() > 0 and value.size(0) == batch
    return is_list_of_strings(value, batch)


def is_dense(value: Tensor) -> bool:
    """Whether rows of it can be taken."""
    return value.layout == torch.strided and not value.is_nested


def check_dense(values: Any, batch: int) -> None:
    """Raises ValueError where a tensor belongs to the samples whose rows cannot be taken."""
    for path, value in tree_flatten_with_path(values, is_leaf=lambda x: isinstance(x, Shared))[0]:
        if isinstance(value, Tensor) and is_per_sample(value, batch) and not is_dense(value):
            raise ValueError(
                f"model_kwargs{keystr(path)}: expected a dense tensor, whose rows can be repeated for timesteps, got a "
                f"{'nested' if value.is_nested else value.layout} one of {batch} rows; mark it with "
                "deqdiff_fast.shared(...) if it belongs to all samples"
            )


def is_whole(value: Any, batch: int) -> bool:
    """Whether a walk through `model_kwargs` takes it as one value, though it is a container."""
    return isinstance(value, Shared) or is_list_of_strings(value, batch)


def select_rows(values: Any, batch: int, rows: Tensor) -> Any:
    """`values` as a model wants them for `rows`: (n,), with all that is per sample indexed, in nested containers too,
    and the rest, what `shared` has marked among it, as it is."""
    return _select(values, batch, rows, lambda value: value.value if isinstance(value, Shared) else value)


def select_samples(values: Any, batch: int, samples: Tensor) -> Any:
    """`values` for a batch of some of the samples, (m,) indices. What belongs to none of them is marked as `shared`,
    for it may have m rows."""
    return _select(
        values, batch, samples, lambda value: shared(value) if isinstance(value, (Tensor, list, tuple)) else value
    )


def _select(values: Any, batch: int, rows: Tensor, rest: Callable[[Any], Any]) -> Any:
    """`values` with all that is per sample indexed by `rows`, and what `rest` makes of everything else."""

    def select(value: Any) -> Any:
        if not is_per_sample(value, batch):
            return rest(value)
        if not isinstance(value, Tensor):
            return type(value)(value[row] for row in rows.tolist())
        if not is_dense(value):
            if rows.tolist() == list(range(batch)):
                return value
            check_dense(values, batch)
        at = rows.to(value.device)
        return value[at] if value.dtype in _UNSIGNED else value.index_select(0, at)

    return tree_map(select, values, is_leaf=lambda value: isinstance(value, Shared) or is_list_of_strings(value))


def is_guess(value: Any, batch: int) -> bool:
    """Whether it is taken for one value a sample though it could as well be meant for none: B numbers, B strings."""
    numbers = isinstance(value, Tensor) and value.dim() == 1 and value.is_floating_point()
    return is_list_of_strings(value, batch) or (numbers and is_per_sample(value, batch))


def with_guesses_shared(model_kwargs: dict[str, Any], batch: int) -> dict[str, Any]:
    """The same with all guesses marked as `shared`."""
    found: dict[str, Any] = tree_map(
        lambda value: shared(value) if is_guess(value, batch) else value, model_kwargs,
        is_leaf=lambda value: is_whole(value, batch),
    )  # fmt: skip
    return found


def warn_of_guesses(model_kwargs: dict[str, Any], batch: int) -> None:
    """Log, once for each, what `model_kwargs` leave open: whether a value belongs to the samples; and what is large."""
    for name, what, taken in _guesses(model_kwargs, "", batch) if batch > 1 else ():
        _tell(logging.WARNING, f"model_kwargs{name}: {what}, for {batch} samples, {taken}")
    leaves = tree_flatten_with_path(model_kwargs, is_leaf=lambda x: isinstance(x, Shared))[0] if model_kwargs else ()
    for path, value in leaves:
        if isinstance(value, Tensor) and is_per_sample(value, batch) and is_dense(value) and value[:1].nbytes >= _LARGE:
            _tell(
                logging.INFO,
                f"model_kwargs{keystr(path)}: {value[:1].nbytes / 2**20:.1f} MB for each sample are copied for every "
                "timestep of a batch; deqdiff_fast.shared(...) with the numbers of the samples beside it avoids that",
            )


def _tell(level: int, message: str) -> None:
    if message not in _told:
        _told.add(message)
        _log.log(level, "%s", message)


def _guesses(value: Any, name: str, batch: int) -> Iterator[tuple[str, str, str]]:
    """(where, what it is, what it is taken for) of all that could as well be meant otherwise."""
    sample = "is taken for one a sample; mark it with deqdiff_fast.shared(...) if it belongs to none"
    kept = "is passed on as it is, whatever rows a call has; give a tensor of rows if it has one a sample"
    kind, items = type(value).__name__, value if type(value) in (list, tuple) else ()
    if is_guess(value, batch):
        yield (
            name,
            f"a tensor of {batch} numbers" if isinstance(value, Tensor) else f"a {kind} of {batch} strings",
            sample,
        )
    elif len(items) == batch and not any(isinstance(x, _INNER) or is_per_sample(x, batch) for x in items):
        yield name, f"a {kind} of {batch}", f"{kept}, or mark it with deqdiff_fast.shared(...)"
    elif not isinstance(value, Tensor) and tuple(getattr(value, "shape", ()))[:1] == (batch,):  # an array of numpy, say
        yield name, f"a {kind} of {batch} rows", f"{kept}, or mark it with deqdiff_fast.shared(...)"
    for key, item in value.items() if isinstance(value, dict) else enumerate(items):
        yield from _guesses(item, f"{name}[{key!r}]", batch)
