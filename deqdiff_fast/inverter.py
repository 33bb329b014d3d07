"""DEQInverter: the noise that a sampling chain maps to a given image."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ._types import Backend, Generators, Model, OnFailure
from .engine import arguments
from .engine.options import CPU_ELEMENTS, CPU_ROWS
from .errors import ConvergenceWarning, NotConvergedError
from .inversion import resolve
from .inversion.base import DEFAULT_TOL, InversionInfo, InversionStats, Method, Outcome, Task
from .inversion.measure import settle
from .memory import SolverMemory, default_memory
from .schedule import Schedule, SpectralSlope
from .schedule.noise import check_generator

IMAGE_LIMIT = 50.0  # far beyond pixels in [-1, 1] and any latents, below pixels in bytes
Callback = Callable[[InversionInfo], object]


@dataclass
class Inversion:
    """The noise behind a batch of images, and how well it gives them back."""

    noise: Tensor
    """(B, *shape), dtype of the image: the initial state of the chain."""
    reconstruction: Tensor
    """(B, *shape): what the serial chain makes of the noise."""
    error: Tensor
    """(B,) float64, on the CPU: relative L2 distance between reconstruction and image, as measured."""
    converged: Tensor
    """(B,) bool, on the CPU: whether `error` is within the tolerance."""
    stats: InversionStats
    trajectory: Tensor | None = None
    """(T + 1, B, *shape), index 0 the noise and T the image: a start for `DEQSampler.sample(init_trajectory=...)`."""


class DEQInverter:
    """Find the noise that a sampling chain maps to an image.

    model, schedule: as for `DEQSampler`; the chain is the one that is inverted, eta and multistep rules included.
    method: "equilibrium", "fixed_point", "auto" (the faster of these two here), "ddim" or "gradient" (descent), with
    its options as further keyword arguments, or a method object.
    tol: relative L2 error allowed between the image and what the serial chain makes of the noise (None: 1e-3).
    max_rounds: model calls that wait for each other before giving up (None: the method's own limit). window: timesteps
    solved at a time, or "auto". spectrum: the data's power spectrum, a better start and slope. max_batch, backend,
    memory: as for `DEQSampler`. on_failure: what to do when the tolerance is missed: finish one step after the other
    and hand over the best noise ("serial"), raise NotConvergedError ("raise"), or warn ("warn").

    Raises TypeError for unknown arguments and ValueError for bad values.
    """

    def __init__(
        self,
        model: Model,
        schedule: Schedule,
        method: str | Method = "equilibrium",
        *,
        tol: float | None = None,
        max_rounds: int | None = None,
        window: int | str = "auto",
        spectrum: SpectralSlope | None = None,
        max_batch: int | None = None,
        backend: Backend = "auto",
        on_failure: OnFailure = "serial",
        memory: SolverMemory | None = None,
        **options: Any,
    ) -> None:
        arguments.check_model(model)
        arguments.check_schedule(schedule)
        self.model, self.schedule = model, schedule
        self.method = resolve(method, options)
        if spectrum is not None and not isinstance(spectrum, SpectralSlope):
            raise TypeError(f"spectrum: expected a SpectralSlope or None, got {type(spectrum).__name__}")
        self.spectrum = spectrum
        self.tol = arguments.positive("tol", tol) or DEFAULT_TOL
        self.max_rounds = arguments.count("max_rounds", max_rounds)
        self.max_batch = arguments.count("max_batch", max_batch)
        self.window = arguments.window(window)
        self.backend: Backend = arguments.choice("backend", backend, ("auto", "reference", "cpp", "triton"))
        self.on_failure: OnFailure = arguments.choice("on_failure", on_failure, ("serial", "raise", "warn"))
        self.memory = memory if memory is not None else default_memory()

    def invert(
        self,
        image: Tensor,
        model_kwargs: dict[str, Any] | None = None,
        generator: Generators = None,
        callback: Callback | None = None,
        progress: bool = False,
        *,
        init_trajectory: Tensor | None = None,
    ) -> Inversion:
        """Find the noise of each image of a batch.

        image: (B, *shape), finite, floating point, as the chain would return it (pixels in [-1, 1], or latents).
        model_kwargs: passed to every model call, as in `DEQSampler.sample`. generator: of the frozen noise of a
        stochastic schedule, which must have one; it is not advanced, so that the same generator given to the sampler
        afterwards draws the same noise. callback: called as the solve goes on with an `InversionInfo`; returning True
        stops it. progress: a bar. init_trajectory: (T + 1, B, *shape), a starting guess.

        Returns an `Inversion`. Its error is always measured with the serial chain; those T calls are counted in
        `stats.verify_evals`. Raises ValueError, TypeError, NonFiniteError, ModelOutputError, NotConvergedError.
        """
        self._check(image, model_kwargs, generator, callback, init_trajectory)
        clock = time.perf_counter()
        with torch.no_grad(), _Reporter(callback, progress) as report:
            task = self._task(image, model_kwargs, generator, report, init_trajectory)
            outcome = self.method.solve(task)
            return self._conclude(task, outcome, clock)

    def _conclude(self, task: Task, outcome: Outcome, clock: float) -> Inversion:
        """Measure, and raise or warn where the tolerance is missed."""
        reconstruction, error = settle(task, self.method, outcome)
        stats = outcome.stats
        stats.wall_seconds = time.perf_counter() - clock
        converged = error <= task.tol
        result = Inversion(outcome.noise, reconstruction, error, converged, stats, outcome.trajectory)
        if self.method.exact and not bool(converged.all()) and self.on_failure != "serial":
            message = (
                f"{int((~converged).sum())} of {task.batch} images are not reproduced to {task.tol:g} (largest error "
                f"{float(error.max()):.1e}) after {stats.rounds} rounds; raise max_rounds or loosen tol"
            )
            if self.on_failure == "raise":
                raise NotConvergedError(message, result)
            warnings.warn(message, ConvergenceWarning, stacklevel=3)
        return result

    def _task(self, image: Tensor, model_kwargs: Any, generator: Any, report: Any, init: Tensor | None) -> Task:
        limit = self.max_batch
        if limit is None and image.device.type == "cpu":
            limit = max(CPU_ROWS, CPU_ELEMENTS // max(image[:1].numel(), 1))
        return Task(
            self.model, self.schedule, image, model_kwargs, generator, self.tol, self.max_rounds, self.window,
            self.backend, self.on_failure, limit, self.memory, self.spectrum, report if report.wanted else None, init,
        )  # fmt: skip

    def _check(self, image: object, model_kwargs: Any, generator: Any, callback: Any, init: Tensor | None) -> None:
        arguments.check_image(image)
        assert isinstance(image, Tensor)
        arguments.check_kwargs(model_kwargs)
        arguments.check_callback(callback)
        check_generator(generator, image.shape[0])
        arguments.check_trajectory(init, image, self.schedule.num_steps)
        if self.schedule.stochastic and generator is None:
            raise ValueError(
                "generator: this schedule adds noise on its way, and an inversion holds for one draw of it only; pass "
                "a torch.Generator and give one in the same state to the sampler"
            )
        if self.spectrum is not None and self.spectrum.shape != tuple(image.shape[1:]):
            raise ValueError(
                f"image: expected images of the spectrum's shape {self.spectrum.shape}, got {tuple(image.shape[1:])}"
            )
        clip = self.schedule.clip
        limit, why = (
            (IMAGE_LIMIT, "scale pixels to [-1, 1]") if clip is None else (clip.range, "the schedule clips there")
        )
        largest = float(image.detach().abs().max())
        if largest > limit * (1 + 1e-3):
            raise ValueError(f"image: expected values within {limit:g} of zero ({why}), got {largest:g}")


class _Reporter:
    """The user's callback and the progress bar; a context manager, so that the bar is closed whatever happens."""

    def __init__(self, callback: Callback | None, bar: bool) -> None:
        self.callback, self.wanted = callback, bar or callback is not None
        self.bar: Any = tqdm(unit="state", desc="inverting") if bar else None

    def __enter__(self) -> _Reporter:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def __call__(self, info: InversionInfo) -> object:
        if self.bar is not None:
            self.bar.total = info.num_steps * len(info.front)
            self.bar.update(int(info.front.sum()) - self.bar.n)
            self.bar.set_postfix(round=info.round, residual=f"{float(info.residual.max()):.1e}")
        return None if self.callback is None else self.callback(info)
