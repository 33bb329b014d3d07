"""Any sampler of k-diffusion's contract as a `Schedule`, by giving it random numbers in the place of denoised samples.

What it makes of them is fitted as the steps of diffusers' schedulers are. A sampler that is affine in its start, the
denoised samples and its noise together is a run without noise plus one in which start and samples are zero: the latter
says what the noise adds, as the sampler's own code draws it, Brownian trees and churn included.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._devices import users_settings
from .._types import FrozenNoise
from ..errors import NotAffineError
from ..schedule import Schedule
from ..schedule.affine_fit import Recursion, fit
from ..schedule.probe import SHAPE, Probing

_MAX_LAGS = 8  # LMS of order 4 looks back 4 calls, twice as many where a step has two
_TOLERANCE, _VERIFY_TOLERANCE = 1e-10, 1e-8
_SIZES = ((1.0, 30.0), (1 / 30, 1 / 30))  # of the two samples it is checked on: it may do something else beyond a bound


@dataclass
class RecordedSampler:
    """What a sampler computes: a model along `schedule` from `start`, with `noise`."""

    schedule: Schedule
    start: Tensor  # (B, *shape), what the model is called with first
    noise: FrozenNoise | None
    steps: dict[int, dict[str, Any]]
    """Which model calls are the first of a step, with what the sampler's callback is told of it: i, sigma, sigma_hat"""


class _Recorder:
    """In the place of a model: keeps what it is called with, and returns `outputs` in turn."""

    def __init__(self, model: Any, draw: Callable[[], Tensor]) -> None:
        self._model, self._draw = model, draw
        self.states: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self.sigmas: list[float] = []
        self.steps: dict[int, dict[str, Any]] = {}

    def __call__(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        self.states.append(x.clone())
        self.sigmas.append(float(sigma.flatten()[0]))
        self.outputs.append(self._draw())
        return self.outputs[-1].clone()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def note(self, told: dict[str, Any]) -> None:
        """The sampler's callback."""
        self.steps[len(self.states) - 1] = {name: told[name] for name in ("i", "sigma", "sigma_hat") if name in told}

    def run(self, sampler: Callable[..., Any], x: Tensor, sigmas: Tensor, extra: dict[str, Any], **given: Any) -> None:
        end = sampler(self, x.clone(), sigmas, extra_args=dict(extra), callback=self.note, disable=True, **given)
        if not isinstance(end, Tensor) or end.shape != x.shape or not self.states:
            raise NotAffineError("it returns something else than a state, or never calls its model")
        self.states.append(end)


def record_sampler(
    sampler: Callable[..., Any], model: Any, x: Tensor, sigmas: Tensor, extra: dict[str, Any]
) -> RecordedSampler:
    """What `sampler(model, x, sigmas, extra, callback, disable)` computes, without a call of the model.

    The noise is drawn as the sampler would draw it now. Raises NotAffineError for one that is no chain of that kind.
    """
    name = getattr(getattr(sampler, "func", sampler), "__name__", type(sampler).__name__)
    try:
        recursion, levels = _recursion(sampler, model, sigmas.detach().cpu().double(), extra)
        own = _Recorder(model, lambda: torch.zeros_like(x))
        with users_settings():
            own.run(sampler, torch.zeros_like(x), sigmas, extra)
        if len(own.states) != len(levels):
            raise NotAffineError("it calls its model another number of times when it is run again")
    except Exception as error:
        what = str(error) if isinstance(error, NotAffineError) else f"it raised {type(error).__name__}: {error}"
        raise NotAffineError(
            f"method: {name} cannot be solved in parallel for these sigmas ({what}); there are 'euler', 'dpmpp_2m' and "
            "every sampler that is affine in its noise and the model's outputs"
        ) from error
    added = _added(recursion, own.states)
    draws = torch.tensor([bool((noise != 0).any()) for noise in added], device="cpu")
    schedule = Schedule(
        levels[:-1], torch.ones_like(levels[:-1]), recursion.state_coef, recursion.model_coef, draws.double(),
        torch.ones_like(levels), levels, "sample", name=f"{name}({len(levels) - 1})", init_noise_sigma=float(levels[0]),
    )  # fmt: skip
    drawn = [noise for noise, draw in zip(added, draws.tolist()) if draw]
    return RecordedSampler(schedule, x + own.states[0], FrozenNoise(torch.stack(drawn)) if drawn else None, own.steps)


def _recursion(
    sampler: Callable[..., Any], model: Any, sigmas: Tensor, extra: dict[str, Any]
) -> tuple[Recursion, Tensor]:
    """The chain without its noise, checked on runs with noise; the levels (T + 1,) of its states."""
    own = torch.Generator().manual_seed(0)
    takes = inspect.signature(sampler).parameters

    def normal() -> Tensor:  # not randn, which is the sampler's noise while it runs
        return torch.empty(SHAPE, dtype=torch.float64).normal_(generator=own)

    def run(sizes: tuple[float, float], noise: Tensor) -> tuple[Tensor, Tensor, Tensor, list[float]]:
        def draw() -> Tensor:
            return normal() * torch.tensor(sizes, dtype=torch.float64).view(2, 1, 1, 1)

        found, start, mode = _Recorder(model, draw), draw(), Probing()
        mode.noise = noise
        given = {"noise_sampler": lambda *levels: noise} if "noise_sampler" in takes else {}
        with mode:
            found.run(sampler, start, sigmas, extra, **given)
        return (
            start.flatten(),
            torch.stack(found.states).flatten(1),
            torch.stack(found.outputs).flatten(1),
            found.sigmas,
        )

    noise = normal()
    first, states, outputs, levels = run((1.0, 1.0), 0 * noise)
    _, still, _, _ = run((0.0, 0.0), noise)
    checks = [run(sizes, noise) for sizes in _SIZES]
    if not all(len(states) == len(other) for other in (still, *(noisy for _, noisy, _, _ in checks))):
        raise NotAffineError("how often it calls its model depends on what that returns")
    if not torch.equal(states[0], first):
        raise NotAffineError("it does not begin with the state that it is given")
    found = fit(states, outputs, torch.zeros_like(outputs), max_lags=_MAX_LAGS, tolerance=_TOLERANCE)
    whole = Recursion(found.state_coef, found.model_coef, torch.ones(len(outputs), dtype=torch.float64))
    added = torch.stack(_added(found, list(still)))
    for start, noisy, drawn, _ in checks:
        apart = (whole.replay(start + still[0], drawn, added) - noisy).abs().amax(1)
        if not bool((apart <= _VERIFY_TOLERANCE * noisy.abs().amax(1).cummax(0).values).all()):
            raise NotAffineError("it bounds or rescales something, or its noise depends on its state or the outputs")
    return whole, torch.tensor([*levels, float(sigmas[-1])], dtype=torch.float64)


def _added(recursion: Recursion, states: list[Tensor]) -> list[Tensor]:
    """What is added in each step of a chain (T + 1 states) whose outputs are all zero."""
    kind = torch.promote_types(states[0].dtype, torch.float32)
    found = []
    for i, after in enumerate(states[1:]):
        rest = after.to(kind, copy=True)
        for lag in range(min(recursion.state_coef.shape[1], i + 1)):
            if weight := float(recursion.state_coef[i, lag]):
                rest -= weight * states[i - lag].to(kind)
        found.append(rest.to(states[0].dtype))
    return found
