"""The beginning of a request: its arguments are checked, on several ranks against those of the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..model.sample_kwargs import check_dense
from ..ranks.agreement import begin_together
from ..ranks.digests import random_state, software, weights_digest
from . import arguments
from .node_only import check_request
from .options import Options
from .solve import Request

_NAMES = (
    "software", "call", "options", "schedule", "noise", "values of the noise", "model_kwargs", "generator",
    "init_trajectory", "weights of the model",
)  # fmt: skip


@contextmanager
def begun(
    usable: Callable[[torch.device], float], options: Options, what: tuple[Any, ...], request: Request,
    model_kwargs: dict[str, Any] | None, reverse: bool = False,
) -> Iterator[None]:  # fmt: skip
    """A solve of the request within it: its arguments are sound, and the same on all ranks; where it
    ends on one it ends on all. Its callback becomes the one that all ranks have agreed on.

    Args:
        usable: bytes of memory that a solve may take on a device.
        what: is asked for: the method, and settings of the sampler that are not among the options.
        reverse: see `Options.check_request`.

    Raises:
        ValueError, TypeError, NotImplementedError: a bad argument.
        RankError: ranks were called with other arguments.
    """

    def check() -> None:
        options.check_request(request.noise, model_kwargs, request.generator, reverse)
        if model_kwargs and what[0] != "serial":
            check_dense(model_kwargs, len(request.noise))
        check_request(options, request)
        arguments.check_trajectory(request.init_trajectory, request.noise, options.schedule.num_steps)
        arguments.check_callback(request.callback)

    if options.ranks is None:
        check()
        yield
        return
    with options.ranks.together():
        request.callback = begin_together(
            options.ranks, check, lambda: _facts(options, what, request, model_kwargs), _NAMES, request.callback,
            request.progress, usable(getattr(request.noise, "device", torch.device("cpu"))),
        )  # fmt: skip
        yield


def _facts(
    options: Options, what: tuple[Any, ...], request: Request, model_kwargs: dict[str, Any] | None
) -> dict[str, Any]:
    """All that must be the same on all ranks, by its name in `_NAMES`."""
    noise, model, schedule = request.noise, options.model, options.schedule
    named = ("solver", "tol", "max_rounds", "window", "backend", "on_failure", "max_batch", "deterministic")
    settings = [getattr(options, name) for name in (*named, "spectrum", "certify", "shard_states", "offload")]
    settings.append(options.learned.get("max_batch"))
    inputs = (noise, *getattr(model, "conditioning_tensors", list)())
    gradients = (torch.is_grad_enabled(), [tensor.requires_grad for tensor in inputs])
    draws = schedule.stochastic or request.generator is not None
    values: tuple[Any, ...] = (
        software(noise.device),
        (what, request.return_trajectory, gradients, getattr(model, "rescale", None)),
        (settings, None if options.weight is None else options.weight.key, weights_digest(options.draft)),
        schedule,
        (tuple(noise.shape), noise.dtype),
        noise,
        (model_kwargs, inputs[1:], getattr(model, "scale", None)),
        random_state(request.generator, noise.device) if draws else None,
        request.init_trajectory,
        weights_digest(model),
    )
    return dict(zip(_NAMES, values, strict=True))
