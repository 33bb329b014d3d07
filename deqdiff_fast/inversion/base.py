"""What an inversion is given, what it returns, and what a method of inversion is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from .._types import Backend, FrozenNoise, Generators, Model, OnFailure
from ..engine.system import SANE_RMS, System
from ..engine.workspace import Workspace
from ..errors import NonFiniteError
from ..memory import SolverMemory
from ..model.sample_kwargs import select_samples
from ..model.weighted_norm import WeightedNorm
from ..schedule import Schedule, SpectralSlope
from ..schedule.noise import fill_drift, freeze
from ..solution import RoundInfo, Stats, asks_to_stop
from ..solver.picard import Picard

DEFAULT_TOL = 1e-3


@dataclass
class InversionStats(Stats):
    """How an inversion went.

    `rounds` counts the model calls that waited for each other, chunks of one batch as one, serial steps included; the
    check of the result is counted apart.
    """

    verify_evals: int = 0
    """Model evaluations of the serial chain that measured `Inversion.error`."""
    notes: list[str] = field(default_factory=list)
    """What was done besides the ordinary iteration, in words: rows finished one after the other, damping, restarts."""

    def add(self, more: InversionStats) -> None:
        """Count another solve of the same problem too, and append its notes."""
        for name in ("rounds", "model_evals", "model_calls", "repairs", "finished_serially"):
            setattr(self, name, getattr(self, name) + getattr(more, name))
        self.notes += more.notes


@dataclass
class InversionInfo(RoundInfo):
    """The state of a running inversion, valid only during the callback. `front` counts final states from the image."""

    def noise(self) -> Tensor:
        """(B, *shape): the running noise."""
        return self._sample()


@dataclass
class InversionProblem:
    """Images, the chain that they are the end of, and the limits set by the user."""

    model: Model
    schedule: Schedule
    image: Tensor
    """(B, *shape), finite, floating point."""
    model_kwargs: dict[str, Any] | None
    generator: Generators
    """Of the frozen noise. Use `generators()`: this one is never advanced."""
    tol: float
    """Relative L2 error allowed between serial(noise) and image."""
    max_rounds: int | None
    window: int | str
    backend: Backend
    on_failure: OnFailure
    max_batch: int | None
    memory: SolverMemory
    spectrum: SpectralSlope | None
    report: Callable[[InversionInfo], object] | None
    """The user's callback and the progress bar; True asks to stop. Methods call `notify`."""
    init_trajectory: Tensor | None = None
    """(T + 1, B, *shape), a starting guess, or None."""
    norm: WeightedNorm | None = None
    """In which errors are meant; None for L2."""

    @property
    def batch(self) -> int:
        return self.image.shape[0]

    def generators(self) -> Generators:
        """Copies in the state of the user's generators: every chain of this problem draws the same noise."""
        if self.generator is None or isinstance(self.generator, FrozenNoise):
            return self.generator
        if isinstance(self.generator, (list, tuple)):
            return [_copy(generator) for generator in self.generator]
        return _copy(self.generator)

    def with_frozen_noise(self) -> InversionProblem:
        """The same problem with its noise drawn beforehand."""
        shape, dtype, device = tuple(self.image.shape), self.image.dtype, self.image.device
        return replace(self, generator=freeze(self.schedule, shape, self.generators(), dtype, device))

    def select(self, samples: Tensor) -> InversionProblem:
        """That of some of the samples, (m,) indices on the CPU, with their noise drawn beforehand."""
        at, frozen = samples.to(self.image.device), self.with_frozen_noise().generator
        return replace(
            self,
            image=self.image[at],
            model_kwargs=select_samples(self.model_kwargs or {}, self.batch, samples),
            generator=frozen.select(at) if isinstance(frozen, FrozenNoise) else None,
            init_trajectory=None if self.init_trajectory is None else self.init_trajectory[:, at],
        )

    def system(self, slope: SpectralSlope | str | None = "scalar") -> System:
        """The chain as a system; `slope` chooses the basis and the diagonal slope."""
        return System(self.model, self.schedule, self.image, self.model_kwargs, self.max_batch, slope, self.norm)

    def in_norm(self, samples: Tensor) -> Tensor:
        """(n, *shape) -> (n, D), a copy, whose L2 norm is the one in which errors are meant."""
        rows = samples.flatten(1).clone()
        return rows if self.norm is None else self.norm.forward(rows)

    def open_workspace(self, system: System, solver: Any = None, window: int = 1) -> Workspace:
        """Leased memory with the image as state T and the frozen noise in place; the other states are zero.

        Args:
            solver: anything with `plan` and `start`, for memory of its own.
            window: timesteps in one model call.
        """
        work = Workspace.open(system, solver or Picard(), window, self.memory, self.backend)
        chain = work.chain
        chain.states.zero_(), chain.predictions.zero_(), chain.sq_diff.zero_(), chain.sq_norm.zero_()
        rows = self.image.detach().reshape(self.batch, -1).to(system.dtype)
        chain.states[-1].copy_(system.to_basis(rows))
        if chain.drift is not None:
            fill_drift(chain.drift, self.schedule, tuple(self.image.shape), self.generators(), self.image.dtype)
            if system.basis is not None:
                system.basis.forward(chain.drift.flatten(0, 1))
        return work

    def notify(
        self, round: int, limit: int, front: Tensor, residual: Tensor, tolerance: float, noise: Callable[[], Tensor]
    ) -> bool:
        """Report a round of at most `limit`, see `InversionInfo`; whether the user asks to stop. noise: makes the
        running noise."""
        if self.report is None:
            return False
        info = InversionInfo(round, limit, self.schedule.num_steps, front, residual, tolerance, _sample=noise)
        return asks_to_stop(self.report(info))


def _copy(generator: torch.Generator) -> torch.Generator:
    copy = torch.Generator(generator.device)
    copy.set_state(generator.get_state())
    return copy


@dataclass
class MethodResult:
    """What a method found; how good it is, the inverter measures."""

    noise: Tensor
    """(B, *shape)"""
    trajectory: Tensor | None
    """(T + 1, B, *shape), index 0 the noise and T the image."""
    converged: Tensor
    """(B,) bool, on the CPU: whether the method believes that its tolerance holds."""
    stats: InversionStats


class Method(Protocol):
    """One way to invert. Methods hold settings only."""

    @property
    def name(self) -> str: ...

    @property
    def exact(self) -> bool:
        """Whether missing the tolerance is a failure, or the nature of the method."""
        ...

    def solve(self, problem: InversionProblem) -> MethodResult:
        """Find the noise. Called under torch.no_grad(), with at least one image."""
        ...


def noise_and_trajectory(work: Workspace) -> tuple[Tensor, Tensor]:
    """(noise, trajectory), copied out of the solver's memory, in the coordinates and dtype of the model."""
    system = work.system
    shape = (system.num_steps + 1, system.batch, *system.shape)
    trajectory = system.from_basis(work.chain.states.flatten(0, 1)).view(shape).to(system.model_dtype)
    return trajectory[0], trajectory


def check_finite(work: Workspace, states: Tensor, step: int, residual: Tensor, round: int) -> None:
    """Raise NonFiniteError where the model made NaN or Inf of an ordinary input.

    A state that an expanding iteration has driven out of the model's range is not the model's fault.

    Args:
        states: (B, D), what the model was given at that step.
        residual: (B,) of that step.
    """
    broken = ~residual.isfinite()
    if not bool(broken.any()):
        return
    sane = states.square().mean(1).sqrt() <= SANE_RMS
    fault = broken & sane & ~work.chain.predictions[step].isfinite().all(1)
    if bool(fault.any()):
        raise NonFiniteError.at_step(
            "the model returned NaN or Inf", step=step, num_steps=work.system.num_steps,
            timestep=float(work.system.times[step]), round=round, sample=int(fault.int().argmax()),
        )  # fmt: skip


def check_count(name: str, value: object) -> None:
    """Raises ValueError unless `value` is an int >= 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: expected an int >= 1, got {value!r}")
