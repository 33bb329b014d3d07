"""A sampler with k-diffusion's contract: `sample_deq` in the place of `sample_euler` or `sample_dpmpp_2m`.

k-diffusion itself is not imported: its contract is `model(x, sigma * ones(B), **extra_args) -> denoised`.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .._devices import float64, tables_on_cpu, users_default
from .._types import Model, without_marks
from ..engine import arguments
from ..model.knowledge import signature_of
from ..model.sample_kwargs import select_rows
from ..sampler import DEQSampler
from ..schedule import Schedule
from ..solution import RoundInfo, Solution
from .pipelines.fingerprint import Fingerprint

_ROW_TOLERANCE = 1e-2  # relative: far above what another batch size does to rounding, far below a wrong condition
_OPTIONS = tuple(list(inspect.signature(DEQSampler).parameters)[2:])
_VERIFIED: WeakKeyDictionary[Any, dict[Any, Fingerprint]] = WeakKeyDictionary()
_log = logging.getLogger("deqdiff_fast")


@torch.no_grad()
@tables_on_cpu
def sample_deq(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], Any] | None = None,
    disable: bool | None = None,
    *,
    method: str = "euler",
    verify: bool = True,
    report: Callable[[Solution], Any] | None = None,
    **options: Any,
) -> Tensor:
    """The result of k-diffusion's `sample_euler` (without churn) or `sample_dpmpp_2m`, solved for all sigmas at once.

    Args:
        model: `model(x, sigma, **extra_args) -> denoised`, x: (n, *shape), sigma: (n,), in the dtype of x. The rows of
            one call are at several noise levels: a model that reads `sigma[0]` only, or that stores masks for B rows in
            itself, gives wrong results.
        x: (B, *shape), the state at sigmas[0].
        sigmas: (T + 1,), strictly descending.
        extra_args: passed to every call; tensors of first dimension B, in lists and dicts too, belong to the samples.
        callback: called with a dict of x, i, sigma, sigma_hat and denoised for every step in order, once it is final;
            several times after the same round, say. Its result is ignored; what it raises ends the solve.
        disable: True hides the progress bar, None where stderr is no terminal.
        method: "euler" or "dpmpp_2m", for models with x0 + sigma noise and for flow matching alike.
        verify: compare one call on several noise levels with separate ones first (at the first, middle and last sigma:
            4 calls, 6 B rows) and refuse what differs; once for a model as it is and a kind of arguments.
        report: is given the `Solution` with its stats.
        **options: those of `DEQSampler`, by keyword.

    Returns:
        (B, *shape), x at sigmas[-1].

    Raises:
        TypeError: an unknown option.
        ValueError: a bad value, or a model that fails the comparison. And what `DEQSampler.sample` raises.
    """
    unknown = sorted(set(options) - set(_OPTIONS))
    if unknown:
        known = ", ".join(("method", "verify", "report", *_OPTIONS))
        raise TypeError(f"sample_deq: unknown option {', '.join(unknown)}; there are {known}")
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor (B, *shape), got {type(x).__name__}")
    arguments.check_model(model)
    arguments.check_callback(callback)
    if len(sigmas) <= 1:
        return x  # nothing to do, as in k-diffusion
    levels = torch.as_tensor(sigmas)
    denoiser, extra = _DenoiserModel(model), _extra(extra_args)
    sampler = DEQSampler(denoiser, Schedule.from_sigmas(levels, method), **options)
    verified = _check_once(denoiser, x, levels, extra) if verify and len(x) else None
    steps = None if callback is None else _StepCallback(callback, levels)
    solution = sampler.sample(x, extra, callback=steps, progress=_shown(disable))
    if verified is not None:
        _note(model, *verified)
    _log.info("sample_deq: %d rounds, %d evaluations", solution.stats.rounds, solution.stats.model_evals)
    if report is not None:
        report(solution)
    return solution.sample


class _DenoiserModel:
    """The model as the sampler calls it: sigma in the dtype of x, as k-diffusion's `sigma * x.new_ones(B)` is."""

    def __init__(self, model: Model) -> None:
        self.model, self.base_model = model, getattr(model, "base_model", model)
        if hasattr(model, "bind_batch"):
            self.bind_batch = model.bind_batch

    def __call__(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Any:
        return self.model(x, sigma.to(x.dtype), **extra_args)


class _StepCallback:
    """Calls the user's callback for every step that has become final for all samples, in order."""

    def __init__(self, callback: Callable[[dict[str, Any]], Any], sigmas: Tensor) -> None:
        self.callback, self.sigmas, self.seen = callback, sigmas, 0

    def __call__(self, info: RoundInfo) -> None:
        for i in range(self.seen, int(info.front.min())):
            self.seen = i + 1
            sigma = self.sigmas[i]
            self.callback(
                {"x": info.state(i), "i": i, "sigma": sigma, "sigma_hat": sigma, "denoised": info.denoised(i)}
            )


def _check_once(
    denoiser: _DenoiserModel, x: Tensor, sigmas: Tensor, extra_args: dict[str, Any]
) -> tuple[dict[Any, Fingerprint], Any]:
    """`check_rows`, but for a model object that has passed it with such arguments, and that nobody has changed since.

    Returns where to note that it has passed, and under which key.
    """
    ends = (float(sigmas[0]), float(sigmas[-2]), len(sigmas))
    asked = (signature_of(x, extra_args), len(x), ends)
    try:
        passed = _VERIFIED.setdefault(denoiser.model, {})
    except TypeError:  # neither hashed nor weakly referenced
        passed = {}
    if passed.get(asked) != Fingerprint(denoiser.model):
        check_rows(denoiser, x, sigmas, extra_args)
    return passed, asked


def _note(model: Model, passed: dict[Any, Fingerprint], asked: Any) -> None:
    """That a model has passed; after the solve, for what its own calls have changed is not held against it."""
    passed[asked] = Fingerprint(model).released()


def check_rows(model: Model, x: Tensor, sigmas: Tensor, extra_args: dict[str, Any]) -> None:
    """Raise ValueError unless one call on rows of several noise levels does what a call for each level does.

    The samples are in another order at every level, so that conditions that are merely tiled do not pass.
    """
    batch, count = len(x), len(sigmas) - 1
    bind = getattr(model, "bind_batch", None)
    kwargs = extra_args if bind is None else bind(batch, extra_args)
    levels = sigmas[sorted({0, count // 2, count - 1})].to(x.device, x.dtype)
    states, times = [x * (level / levels[0]) for level in levels], [level.expand(batch) for level in levels]
    apart = [_call(model, state, time, without_marks(kwargs)) for state, time in zip(states, times)]
    rows = torch.cat([torch.arange(batch).roll(shift + 1).flip(0) + shift * batch for shift in range(len(levels))])
    rows = rows.to(x.device)
    state, time, single = torch.cat(states)[rows], torch.cat(times)[rows], float64(torch.cat(apart)[rows].flatten(1))
    try:
        together = _call(model, state, time, select_rows(kwargs, batch, rows % batch))
    except Exception as error:
        raise ValueError(
            f"model: it works on one noise level, but not on a batch of {len(levels)} levels x {batch} samples "
            f"({type(error).__name__}: {error}); it cannot be sampled in parallel"
        ) from error
    difference = (float64(together.flatten(1)) - single).norm(dim=1)
    size = torch.maximum(single.norm(dim=1), 1e-4 * float64(state.flatten(1)).norm(dim=1))
    worst = float((difference / size).max())
    if not worst <= _ROW_TOLERANCE:
        raise ValueError(
            f"model: its rows are not independent: a batch of several noise levels differs from separate calls by "
            f"{worst:.1e} (relative). It probably reads sigma[0] for all rows (conditioning windows, timestep ranges) "
            "or keeps masks or conditions for one batch of samples; take those out, pass them in extra_args with one "
            "row for each sample, or use an ordinary sampler"
        )


def _call(model: Model, x: Tensor, sigma: Tensor, kwargs: dict[str, Any]) -> Tensor:
    with users_default():
        out = model(x, sigma, **kwargs)
    if not isinstance(out, Tensor) or out.shape != x.shape:
        got = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f"model: expected the denoised sample, a tensor of shape {tuple(x.shape)}, got {got}")
    return out


def _extra(extra_args: object) -> dict[str, Any]:
    if extra_args is not None and not isinstance(extra_args, dict):
        raise TypeError(f"extra_args: expected a dict or None, got {type(extra_args).__name__}")
    return dict(extra_args or {})


def _shown(disable: bool | None) -> bool:
    return sys.stderr.isatty() if disable is None else not disable
