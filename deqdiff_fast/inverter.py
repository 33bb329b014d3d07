"""DEQInverter: the noise that a sampling chain maps to a given image."""

from __future__ import annotations

import time
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ._devices import with_torch_defaults
from ._types import Backend, Generators, Model, OnFailure
from .engine import arguments
from .engine.reporting import ProgressBar, report_not_converged
from .engine.row_limit import row_limit
from .inversion import resolve
from .inversion.base import DEFAULT_TOL, InversionInfo, InversionProblem, InversionStats, Method
from .inversion.begin import begun
from .inversion.bound_model import bind
from .inversion.verification import verify_and_refine
from .memory import SolverMemory, default_memory
from .model.sample_kwargs import warn_of_guesses
from .model.transforms import check_inputs
from .model.weighted_norm import Weight
from .ranks import sharded
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
    """(B,) float64, on the CPU: relative distance between reconstruction and image, as measured; L2, or weighted."""
    converged: Tensor
    """(B,) bool, on the CPU: whether `error` is within the tolerance."""
    stats: InversionStats
    trajectory: Tensor | None = None
    """(T + 1, B, *shape), index 0 the noise and T the image: a start for `DEQSampler.sample(init_trajectory=...)`."""


class DEQInverter:
    """Find the noise that a sampling chain maps to an image, eta and multistep rules included.

    The system of Pokle, Geng, Kolter 2022, arXiv 2210.12867, with the image given and the noise unknown.

    Args:
        model, schedule: as for `DEQSampler`.
        method: "equilibrium", "fixed_point", "auto" (the faster of these two here), "ddim" (approximate) or "gradient"
            (descent); or a method object.
        tol: relative L2 error allowed between the image and what the serial chain makes of the noise (None: 1e-3).
        max_rounds: model calls that wait for each other before giving up (None: the method's own limit).
        window: timesteps solved at a time, or "auto".
        spectrum: the data's power spectrum, a better start and slope.
        weight: of the norm in which `tol` and `Inversion.error` are meant, as for `DEQSampler`; not with a spectrum.
        max_batch, backend, memory, group: as for `DEQSampler`.
        on_failure: what to do when the tolerance is missed: finish one step after the other and hand over the best
            noise ("serial"), raise NotConvergedError ("raise"), or warn ("warn").
        **options: of a method given by its name, see `Equilibrium`, `FixedPoint`, `DDIMInversion` and `Optimise`.

    Raises:
        TypeError: an unknown argument, or one of a wrong type.
        ValueError: a bad value.
    """

    @with_torch_defaults
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
        weight: Tensor | None = None,
        max_batch: int | None = None,
        backend: Backend = "auto",
        on_failure: OnFailure = "serial",
        memory: SolverMemory | None = None,
        group: Any = None,
        **options: Any,
    ) -> None:
        arguments.check_model(model)
        arguments.check_schedule(schedule)
        self.model, self.schedule = model if group is None else sharded(model, group), schedule
        self.method = resolve(method, options)
        if spectrum is not None and not isinstance(spectrum, SpectralSlope):
            raise TypeError(f"spectrum: expected a SpectralSlope or None, got {type(spectrum).__name__}")
        self.spectrum = spectrum
        slope = getattr(self.method, "slope", None)
        self.weight = Weight.given(weight, spectrum is not None or isinstance(slope, SpectralSlope))
        self.tol = arguments.positive("tol", tol) or DEFAULT_TOL
        self.max_rounds = arguments.count("max_rounds", max_rounds)
        self.max_batch = arguments.count("max_batch", max_batch)
        self.window = arguments.window(window)
        self.backend: Backend = arguments.choice("backend", backend, ("auto", "reference", "cpp", "triton"))
        self.on_failure: OnFailure = arguments.choice("on_failure", on_failure, ("serial", "raise", "warn"))
        arguments.check_memory(memory)
        self.memory = memory if memory is not None else default_memory()

    def __copy__(self) -> DEQInverter:
        new = object.__new__(type(self))
        vars(new).update(vars(self), memory=copy(self.memory))
        return new

    @with_torch_defaults
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

        Args:
            image: (B, *shape), finite, floating point, as the chain would return it (pixels in [-1, 1], or latents).
            model_kwargs: passed to every model call, as in `DEQSampler.sample`.
            generator: of the frozen noise of a stochastic schedule, which must have one. It is not advanced, so that
                the same generator given to the sampler afterwards draws the same noise.
            callback: called as the solve goes on with an `InversionInfo`; returning True stops it.
            progress: show a bar.
            init_trajectory: (T + 1, B, *shape), a starting guess.

        Returns:
            An `Inversion`. Its error is always measured with the serial chain; those T calls are counted in
            `stats.verify_evals`.

        Raises:
            ValueError, TypeError: a bad argument.
            NonFiniteError: the model returned NaN or Inf.
            ModelOutputError: the model returned something that is not a prediction.
            NotImplementedError: an argument carries a forward-mode tangent or belongs to a torch.func transform.
            NotConvergedError: the tolerance is missed and `on_failure` is "raise".
        """
        start_time = time.perf_counter()
        check = partial(self._check, image, model_kwargs, generator, callback, init_trajectory)
        given = model_kwargs, generator, init_trajectory
        with (
            begun(self, check, image, given, callback, progress) as callback,
            torch.no_grad(),
            ProgressBar(progress, "inverting", "state") as bar,
        ):
            report = _reporter(bar, callback) if progress or callback is not None else None
            model, model_kwargs = bind(self.model, image.shape[0], model_kwargs)
            limit = row_limit(self.max_batch, image, getattr(model, "deqdiff_ranks", None))
            problem = InversionProblem(
                model=model, schedule=self.schedule, image=image.detach(), model_kwargs=model_kwargs,
                generator=generator, tol=self.tol, max_rounds=self.max_rounds, window=self.window, backend=self.backend,
                on_failure=self.on_failure, max_batch=limit, memory=self.memory, spectrum=self.spectrum, report=report,
                init_trajectory=init_trajectory,
                norm=None if self.weight is None else self.weight.on(tuple(image.shape[1:])),
            )  # fmt: skip
            found = self.method.solve(problem)
            reconstruction, error = verify_and_refine(problem, self.method, found)
        stats, converged = found.stats, error <= self.tol
        stats.wall_seconds = time.perf_counter() - start_time
        result = Inversion(found.noise, reconstruction, error, converged, stats, found.trajectory)
        if self.method.exact and not bool(converged.all()) and self.on_failure != "serial":
            worst = f"largest error {float(error.max()):.1e}"
            failure = f"images are not reproduced to {self.tol:g} ({worst}) after {stats.rounds} rounds"
            report_not_converged(result, self.on_failure, failure, "raise max_rounds or loosen tol", stacklevel=2)
        return result

    def _check(self, image: object, model_kwargs: Any, generator: Any, callback: Any, init: Tensor | None) -> None:
        check_inputs(self.model, image=image, model_kwargs=model_kwargs)
        arguments.check_image(image)
        assert isinstance(image, Tensor)
        arguments.check_kwargs(model_kwargs)
        arguments.check_callback(callback)
        check_generator(generator, image.shape[0])
        warn_of_guesses(model_kwargs or {}, image.shape[0])
        arguments.check_trajectory(init, image, self.schedule.num_steps)
        if self.weight is not None:
            self.weight.on(tuple(image.shape[1:]))
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


def _reporter(bar: ProgressBar, callback: Callback | None) -> Callback:
    """What a method calls after every round."""

    def report(info: InversionInfo) -> object:
        total = info.num_steps * len(info.front)
        bar.show(int(info.front.sum()), info.residual, total=total, round=info.round)
        return None if callback is None else callback(info)

    return report
