"""DEQRestorer: images from linear measurements of them, by a diffusion chain that is solved in parallel rounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ._devices import methods_with_torch_defaults
from ._types import Generators, Model, shared
from .engine import arguments
from .engine.reporting import ProgressBar
from .gradient.base import refuse_inference_mode
from .model.stand_in import stand_in
from .operators import check, take
from .restoration import Method, resolve
from .restoration.base import Start, Task
from .restoration.checks import check_measurements, check_noise_for, noise_factor, noise_level
from .restoration.draws import draw_noise, replayed
from .restoration.fit import Descent, Loss
from .restoration.gains import chain_slope
from .restoration.levels import Levels
from .restoration.model import KEY, RestoringModel
from .restoration.result import FittedNoise, Restoration
from .restoration.tolerance import add_up, looser, near_enough, shares
from .restoration.unknowns import UnknownsSolver
from .sampler import DEQSampler
from .schedule import Schedule
from .schedule.prior import prior_spectrum
from .solution import Callback, Solution, Stats


@methods_with_torch_defaults
class DEQRestorer:
    """Restore images from measurements y = A x + sigma n with a diffusion model, all timesteps at once.

    The chain is the sampler's with another predicted clean sample at every step, which the measurements decide in part;
    parallel restoration as one equilibrium is Cao et al. 2024, arXiv 2311.11600 (DeqIR).

    Args:
        model, schedule: as for `DEQSampler`; its eta is that of the restoration.
        operator: A, one of `deqdiff_fast.operators`, a deepinv physics, or any object with A, A_adjoint and A_dagger.
        sigma: standard deviation of the noise in the measurements, in their units: a number, (B,), or None to
            estimate it from measurements that are images.
        method: "ddnm", "ddrm", "pigdm", "diffpir", or a method object.
        temperature: factor of all noise, initial (also `noise=`) and the steps': 1 as the schedule says, for samples,
            0 for none, near their mean; between them a line where the model is linear. Less has a smaller squared error
            (Freirich et al. 2021, arXiv 2107.02555), but takes more rounds.
        **options: of `DEQSampler`: solver, tol, max_rounds, window, gradient, max_batch and so on.

    Raises:
        TypeError: an unknown argument, or one of a wrong type.
        ValueError: a bad value; or the method cannot be used with this operator, schedule or noise.
    """

    def __init__(
        self, model: Model, schedule: Schedule, operator: Any, sigma: float | Tensor | None = 0.0,
        method: str | Method = "ddnm", *, temperature: float = 1.0, **options: Any,
    ) -> None:  # fmt: skip
        arguments.check_model(model)
        arguments.check_schedule(schedule)
        self.model, self.schedule, self.method = model, schedule, resolve(method)
        self.operator, self.sigma, self.temperature = take(operator), noise_level(sigma), noise_factor(temperature)
        self.noisy = self.sigma is None or bool((self.sigma > 0).any())
        self.method.check(self.operator, schedule, self.noisy)
        self._levels, self._coordinates = Levels.of(schedule), self.method.coordinates(self.noisy)
        draft = options.pop("draft", None)
        if draft is not None:
            arguments.check_draft(draft, schedule)
            options["draft"] = self._restoring(stand_in(draft, model))
        self._sampler = DEQSampler(self._restoring(model), replace(schedule, clip=None), **options)
        self._spectrum = options.pop("spectrum", None)
        self._options, self._solvers = options, dict[Any, UnknownsSolver]()
        self._checked = set[Any]()

    def _restoring(self, model: Model) -> RestoringModel:
        sigma = None if self.sigma is None else tuple(self.sigma.flatten().tolist())  # decides what is smooth in time
        variant = (repr(self.method), type(self.operator).__name__, sigma)
        return RestoringModel(
            model, self.method, self._coordinates, self.operator, self.schedule, self._levels, variant
        )

    def restore(
        self, y: Tensor, model_kwargs: dict[str, Any] | None = None, generator: Generators = None,
        callback: Callback | None = None, progress: bool = False, *, noise: Tensor | None = None,
    ) -> Restoration:  # fmt: skip
        """Restore the images behind measurements.

        Differentiable with respect to y, noise, the parameters of the model and tensors in model_kwargs, as
        `DEQSampler.sample` is.

        Args:
            y: (B, ...), floating point, of images in the model's units (pixels in [-1, 1]).
            model_kwargs, callback, progress: as for `DEQSampler.sample`. What a callback sees are the unknowns, which
                lack what the measurements decide.
            generator: one, or one a sample, for the initial noise and then the chain's own.
            noise: (B, *shape), the initial state, in the place of one that is drawn.

        Returns:
            A `Restoration`.

        Raises:
            ValueError, TypeError: bad measurements, a wrong operator (with the identity that it violates), or a bad
                argument.
            NonFiniteError, ModelOutputError, NotConvergedError: as `DEQSampler.sample`.
        """
        task, start, kwargs, solver = self._begin(y, model_kwargs, generator, noise)
        known = self._coordinates.finish(torch.zeros_like(start.state), task, start.data)
        factor, spent = 1.0, list[Stats]()
        steady = not (self.schedule.stochastic or self._coordinates.fresh)  # else estimates are too near for it
        if steady and self._spectrum is not None and solver.trusted:  # images in general tell too little
            factor = looser(known, solver.unseen, solver.variance)
        while True:
            sampler = solver.with_factor(factor)
            solution = sampler.sample(start.state.to(y.dtype), kwargs, start.draws, callback, progress)
            found = self._end(task, start, solution, y)
            share = shares(known, found.sample)
            allowed, over = sampler.options.allowed(start.state.dtype), found.stats.stop_reason == "callback"
            if over or factor == 1.0 or near_enough(found.stats, share, factor, allowed):
                found.stats.error_estimate = found.stats.error_estimate * share
                add_up(found.stats, spent)
                return found
            factor, solver.trusted = 1.0, False  # the unknowns are more of the sample than was expected
            spent.append(found.stats)

    def serial(
        self, y: Tensor, model_kwargs: dict[str, Any] | None = None, generator: Generators = None,
        callback: Callback | None = None, progress: bool = False, *, noise: Tensor | None = None,
    ) -> Restoration:  # fmt: skip
        """The plain restoring chain, one model call after the other; arguments and result as for `restore`."""
        task, start, kwargs, solver = self._begin(y, model_kwargs, generator, noise)
        solution = solver.sampler.serial(start.state.to(y.dtype), kwargs, start.draws, callback, progress)
        return self._end(task, start, solution, y)

    def fit_noise(
        self,
        y: Tensor,
        loss: Loss,
        model_kwargs: dict[str, Any] | None = None,
        generator: Generators = None,
        *,
        noise: Tensor | None = None,
        steps: int = 30,
        lr: float = 0.05,
        optimizer: Callable[..., Optimizer] = torch.optim.Adam,
        progress: bool = False,
    ) -> FittedNoise:
        """Of all images that the measurements allow, look for one that a loss prefers: descend on the initial noise.

        By the sampler's gradient (`gradient=` of the restorer). Weights of the model that need a gradient get none, but
        cost as if they did: call `requires_grad_(False)` on it first.

        Args:
            y, model_kwargs, generator, noise: as for `restore`; noise is where the descent starts. The chain's own
                noise is drawn once.
            loss: `loss(sample)` -> (B,), or one number for all samples; sample: (B, *shape).
            steps: of the optimizer, each a solve and its gradient.
            lr, optimizer: a torch.optim class and its learning rate, or a function from a list of tensors, one for each
                sample, to an optimizer.
            progress: whether to show a bar.

        Returns:
            A `FittedNoise` with the best noise of each sample.

        Raises:
            ValueError: a bad argument, or a loss that is not finite or of another shape; else as `restore`.
        """
        refuse_inference_mode("fit_noise")
        arguments.count("steps", steps)
        arguments.positive("lr", lr)
        if self.temperature == 0:
            raise ValueError("temperature: expected one > 0 to fit noise, for at 0 no sample depends on it")
        checked = check_measurements(y, self.operator, self.sigma)[0]
        shape = tuple(self.operator.input_shape(checked.shape))
        if noise is not None:
            check_noise_for(noise, shape, checked)
        noise, draws = draw_noise(self.schedule, shape, generator, checked, noise, self._coordinates.fresh)
        frozen = replayed(self.schedule, draws, self._coordinates.fresh)
        with ProgressBar(progress, "fitting", "step") as bar:

            def show(step: int, losses: Tensor) -> None:
                if progress:
                    bar.show(step, losses, total=steps, round=step)

            descent = Descent(loss, steps, optimizer, lr, show)
            best, losses = descent.run(noise, lambda z: self.restore(y, model_kwargs, frozen, noise=z).sample)
        with torch.no_grad():
            return FittedNoise(best, self.restore(y, model_kwargs, frozen, noise=best), losses)

    def _begin(
        self, y: Tensor, model_kwargs: dict[str, Any] | None, generator: Generators, noise: Tensor | None
    ) -> tuple[Task, Start, dict[str, Any], UnknownsSolver]:
        """The chain of unknowns, in the dtype of the measurements or float32, and what solves it."""
        arguments.check_kwargs(model_kwargs)
        for name in {KEY, "step"} & set(model_kwargs or {}):
            raise ValueError(f"model_kwargs: {name!r} is a name that the restorer needs itself; wrap the model")
        y, sigma = check_measurements(y, self.operator, self.sigma)
        shape = tuple(self.operator.input_shape(y.shape))
        if (shape, y.device) not in self._checked:
            check(self.operator, shape, torch.float32, y.device)
            self._checked.add((shape, y.device))
        if noise is not None:
            check_noise_for(noise, shape, y)
        task = Task(self.operator, self.schedule, self._levels, y, sigma[:, None] if self.noisy else None)
        fresh = self._coordinates.fresh
        noise, draws = draw_noise(self.schedule, shape, generator, y, noise, fresh, self.temperature)
        start = self._coordinates.begin(task, noise, draws)
        samples = torch.arange(len(y), device=y.device)
        solver = self._solver_for(task, shape)
        own = {"sample": samples, "data": start.data, "slope": shared(solver.slope)}
        return task, start, {**(model_kwargs or {}), KEY: own}, solver

    def _solver_for(self, task: Task, shape: tuple[int, ...]) -> UnknownsSolver:
        """What solves such chains: its slope knows what the measurements leave open."""
        level = 0.0 if task.sigma is None else float(task.sigma.detach().mean())
        key = (shape, f"{level:.1g}", task.y.device)
        if key not in self._solvers:
            weighted = self._options.get("weight") is not None  # in whose norm no spectrum holds
            spectrum, unseen, variance = self._spectrum or (None if weighted else prior_spectrum(shape[1:])), 1.0, 1.0
            if spectrum is not None:
                if spectrum.shape != shape[1:]:
                    expected = f"that of samples of shape {shape[1:]}, which y measures"
                    raise ValueError(f"spectrum: expected {expected}, got {spectrum.shape}")
                variance = float(spectrum.variance.mean())
                known = (spectrum, level if self.noisy else None, shape[0], task.y.device)
                spectrum, unseen = chain_slope(self.method, self.operator, self.schedule, self._levels, *known)
            self._solvers[key] = UnknownsSolver(self._sampler, spectrum, self._options, unseen, variance)
        return self._solvers[key]

    def _end(self, task: Task, start: Start, solution: Solution, y: Tensor) -> Restoration:
        sample = self._coordinates.finish(solution.sample.to(task.y.dtype), task, start.data)
        with torch.no_grad():
            seen = task.operator.A(task.operator.A_dagger(task.y))  # entries that measure nothing say nothing
            off = (task.operator.A(sample) - seen).flatten(1).double().norm(dim=1)
            consistency = (off / seen.flatten(1).double().norm(dim=1).clamp_min(1e-300)).cpu()
        sigma = torch.zeros(len(y)) if task.sigma is None else task.sigma[:, 0]
        return Restoration(
            sample.to(y.dtype), solution.converged, consistency, sigma.detach().double().cpu(), solution.stats
        )
