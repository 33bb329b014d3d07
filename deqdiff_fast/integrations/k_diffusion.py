"""A sampler with k-diffusion's contract: `sample_deq` in the place of `sample_euler`, `sample_dpmpp_2m` and others.

k-diffusion itself is not imported: its contract is `model(x, sigma * ones(B), **extra_args) -> denoised`.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .._devices import with_torch_defaults
from .._types import Model
from ..engine import arguments
from ..engine.row_check import check_rows_now
from ..sampler import DEQSampler
from ..schedule import Schedule
from ..solution import RoundInfo, Solution
from .pipelines.fingerprint import Fingerprint
from .recorded_sampler import RecordedSampler, record_sampler

_OPTIONS = tuple(list(inspect.signature(DEQSampler).parameters)[2:])
_NAMED = ("euler", "dpmpp_2m")
_SEEN: WeakKeyDictionary[Any, Fingerprint] = WeakKeyDictionary()
_log = logging.getLogger("deqdiff_fast")


@torch.no_grad()
@with_torch_defaults
def sample_deq(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], Any] | None = None,
    disable: bool | None = None,
    *,
    method: str | Callable[..., Any] = "euler",
    verify: bool = True,
    report: Callable[[Solution], Any] | None = None,
    **options: Any,
) -> Tensor:
    """The result of one of k-diffusion's samplers, solved for all sigmas at once.

    Args:
        model: `model(x, sigma, **extra_args) -> denoised`, x: (n, *shape), sigma: (n,), in the dtype of x. The rows of
            one call are at several noise levels: a model that reads `sigma[0]` only, or that stores masks for B rows in
            itself, gives wrong results.
        x: (B, *shape), the state at sigmas[0].
        sigmas: (T + 1,), strictly descending; for a sampler of your own what that takes.
        extra_args: passed to every call; tensors of first dimension B, in lists and dicts too, belong to the samples.
        callback: called with a dict of x, i, sigma, sigma_hat and denoised for every step in order, once it is final;
            several times after the same round, say. Its result is ignored; what it raises ends the solve.
        disable: True hides the progress bar, None where stderr is no terminal.
        method: "euler" (`sample_euler` without churn) or "dpmpp_2m", for models with x0 + sigma noise and for flow
            matching alike; or any sampler `f(model, x, sigmas, extra_args, callback, disable)`, say
            `k_diffusion.sampling.sample_heun`, or `partial(sample_dpmpp_2m_sde, eta=0.5)` with options of its own. What
            it does is found by running it on random numbers, and it draws its noise itself, as if it were called.
        verify: compare one call on several noise levels with separate ones first, whatever the plan (3 calls), and
            refuse what differs; once for a model as it is and a kind of arguments. Solves by rounds do so now and then.
        report: is given the `Solution` with its stats.
        **options: those of `DEQSampler`, by keyword.

    Returns:
        (B, *shape), x at sigmas[-1].

    Raises:
        TypeError: an unknown option.
        ValueError: a bad value, or a model that fails the comparison. And what `DEQSampler.sample` raises.
        NotAffineError: a sampler of another kind (with adaptive steps, say).
    """
    _check(method, x, options)
    arguments.check_model(model)
    arguments.check_callback(callback)
    if len(sigmas) <= 1:
        return x  # nothing to do, as in k-diffusion
    levels = torch.as_tensor(sigmas)
    denoiser, extra = _DenoiserModel(model), _extra(extra_args)
    chain = _chain(method, model, x, levels, extra)
    sampler = DEQSampler(denoiser, chain.schedule, **options)
    if verify:
        check_rows_now(sampler.options, x, extra, _changed(model))
    steps = None if callback is None else _StepCallback(callback, chain.steps)
    solution = sampler.sample(chain.start, extra, chain.noise, callback=steps, progress=_shown(disable))
    _remember(model)
    _log.info("sample_deq: %d rounds, %d evaluations", solution.stats.rounds, solution.stats.model_evals)
    if report is not None:
        report(solution)
    return solution.sample


def _check(method: object, x: object, options: dict[str, Any]) -> None:
    """Raises TypeError or ValueError for arguments that nobody else looks at."""
    unknown = sorted(set(options) - set(_OPTIONS))
    if unknown:
        known = ", ".join(("method", "verify", "report", *_OPTIONS))
        raise TypeError(f"sample_deq: unknown option {', '.join(unknown)}; there are {known}")
    if not callable(method) and method not in _NAMED:
        known = " or ".join(map(repr, _NAMED))
        raise ValueError(
            f"method: expected {known}, or a sampler itself, such as k_diffusion.sampling.sample_heun, got {method!r}"
        )
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor (B, *shape), got {type(x).__name__}")


def _chain(
    method: str | Callable[..., Any], model: Model, x: Tensor, levels: Tensor, extra: dict[str, Any]
) -> RecordedSampler:
    """What is to be solved: of the samplers with names the tables are known."""
    if callable(method):
        return record_sampler(method, model, x, levels, extra)
    told = {i: {"i": i, "sigma": sigma, "sigma_hat": sigma} for i, sigma in enumerate(levels[:-1])}
    return RecordedSampler(Schedule.from_sigmas(levels, method), x, None, told)


class _DenoiserModel:
    """The model as the sampler calls it: sigma in the dtype of x, as k-diffusion's `sigma * x.new_ones(B)` is."""

    def __init__(self, model: Model) -> None:
        self.model, self.base_model = model, getattr(model, "base_model", model)
        if hasattr(model, "bind_batch"):
            self.bind_batch = model.bind_batch

    def __call__(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Any:
        return self.model(x, sigma.to(x.dtype), **extra_args)


class _StepCallback:
    """Calls the user's callback for every step that has become final for all samples, in order.

    steps: {number of the step's first model call: what else the callback is told}.
    """

    def __init__(self, callback: Callable[[dict[str, Any]], Any], steps: dict[int, dict[str, Any]]) -> None:
        self.callback, self.steps, self.seen = callback, steps, 0

    def __call__(self, info: RoundInfo) -> None:
        for i in range(self.seen, int(info.front.min())):
            self.seen = i + 1
            if i in self.steps:
                self.callback({"x": info.state(i), **self.steps[i], "denoised": info.denoised(i)})


def _changed(model: Model) -> bool:
    """Whether somebody has changed the model since the last call."""
    try:
        return model in _SEEN and _SEEN[model] != Fingerprint(model)
    except TypeError:  # neither hashed nor weakly referenced
        return False


def _remember(model: Model) -> None:
    """The model as its own calls have left it."""
    with suppress(TypeError):
        _SEEN[model] = Fingerprint(model).released()


def _extra(extra_args: object) -> dict[str, Any]:
    if extra_args is not None and not isinstance(extra_args, dict):
        raise TypeError(f"extra_args: expected a dict or None, got {type(extra_args).__name__}")
    return dict(extra_args or {})


def _shown(disable: bool | None) -> bool:
    return sys.stderr.isatty() if disable is None else not disable
