"""The beginning of an inversion: its arguments are checked, on several ranks against those of the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..planner.free_memory import usable_bytes
from ..ranks.agreement import begin_together
from ..ranks.digests import software, weights_digest

_NAMES = (
    "software", "options", "schedule", "image", "values of the image", "model_kwargs", "generator", "init_trajectory",
    "weights of the model",
)  # fmt: skip
_SETTINGS = ("method", "spectrum", "tol", "max_rounds", "max_batch", "window", "backend", "on_failure")


@contextmanager
def begun(
    inverter: Any, check: Callable[[], None], image: Tensor, arguments: tuple[Any, Any, Any],
    callback: Callable[..., object] | None, progress: bool,
) -> Iterator[Callable[..., object] | None]:  # fmt: skip
    """An inversion within it: its arguments are sound, and the same on all ranks.

    Args:
        inverter: a `DEQInverter`, for its model and settings.
        check: raises what is wrong with the arguments.
        arguments: model_kwargs, generator and init_trajectory.

    Yields:
        The callback that all ranks have agreed on.

    Raises:
        what `check` does, and RankError where ranks were called with other arguments.
    """
    model, ranks = inverter.model, getattr(inverter.model, "deqdiff_ranks", None)
    if ranks is None:
        check()
        yield callback
        return

    def facts() -> dict[str, Any]:
        model_kwargs, generator, init = arguments
        guidance = [getattr(model, name, None) for name in ("scale", "rescale")]
        own: list[Tensor] = getattr(model, "conditioning_tensors", list)()
        values: tuple[Any, ...] = (
            software(image.device),
            ([getattr(inverter, name) for name in _SETTINGS], getattr(inverter.weight, "key", None)), inverter.schedule,
            (tuple(image.shape), image.dtype), image, (model_kwargs, own, guidance), generator, init,
            weights_digest(model),
        )  # fmt: skip
        return dict(zip(_NAMES, values, strict=True))

    with ranks.together():
        device = getattr(image, "device", torch.device("cpu"))
        yield begin_together(ranks, check, facts, _NAMES, callback, progress, usable_bytes(device))
