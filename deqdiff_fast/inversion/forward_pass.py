"""The differentiable chains that a gradient descent can go through: solved in parallel, or the serial one."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .._types import FrozenNoise
from ..engine.system import System
from ..errors import ConvergenceWarning
from ..gradient.base import Gradient
from ..gradient.batched_vjp import BatchedVJP
from ..gradient.fixed_point_map import draw_drift
from ..loop.base import Solver
from ..model.sample_kwargs import select_samples
from ..sampler import DEQSampler
from ..schedule.chain import serial_chain
from ..solver import resolve
from .base import InversionProblem

ForwardPass = Callable[[Tensor, Tensor, "Tensor | None"], "tuple[Tensor, Tensor, int]"]
"""`forward(noise, samples, init)`: noise (n, *shape) of the images `samples` (n,), the trajectory to start from -> the
sample, its trajectory (T + 1, n, *shape) and the number of model calls that waited for each other."""


def _select_noise(problem: InversionProblem, samples: Tensor) -> FrozenNoise | None:
    return problem.generator.select(samples) if isinstance(problem.generator, FrozenNoise) else None


class ParallelForward:
    """`DEQSampler.sample` with a gradient mode. finish: where rounds run out, the chain is finished serially."""

    def __init__(
        self, problem: InversionProblem, solver: str | Solver, tol: float | None, gradient: Gradient, finish: bool
    ) -> None:
        self.problem = problem
        spectral = resolve(solver).slope in ("auto", "spectral")
        self.sampler = DEQSampler(
            problem.model, problem.schedule, solver=solver, tol=tol, window=problem.window, backend=problem.backend,
            gradient=gradient, max_batch=problem.max_batch, spectrum=problem.spectrum if spectral else None,
            memory=problem.memory, on_failure="serial" if finish else "warn",
        )  # fmt: skip

    def __call__(self, noise: Tensor, samples: Tensor, init: Tensor | None) -> tuple[Tensor, Tensor, int]:
        problem = self.problem
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # what is found in the end is measured in any case
            solution = self.sampler.sample(
                noise, select_samples(problem.model_kwargs or {}, problem.batch, samples),
                _select_noise(problem, samples), init_trajectory=init, return_trajectory=True,
            )  # fmt: skip
        assert solution.trajectory is not None
        stats = solution.stats
        rounds = stats.rounds + (stats.finished_serially if stats.stop_reason != "serial" else 0)
        return solution.sample, solution.trajectory.detach(), rounds


class CheckpointedForward:
    """The serial chain, its activations recomputed on the way back, one step at a time (Chen et al. 2016, arXiv
    1604.06174)."""

    def __init__(self, problem: InversionProblem) -> None:
        self.problem = problem

    def __call__(self, noise: Tensor, samples: Tensor, init: Tensor | None) -> tuple[Tensor, Tensor, int]:
        problem = self.problem
        kwargs = select_samples(problem.model_kwargs or {}, problem.batch, samples)
        system = System(problem.model, problem.schedule, noise, kwargs, problem.max_batch)
        vjp = BatchedVJP(system, system.model_kwargs)

        def predict(x: Tensor, i: int) -> Tensor:
            step = torch.full_like(vjp.samples, i)
            pieces = [slice(start, stop) for start, stop in system.chunks(len(x))]
            parts = [checkpoint(vjp.predict, x[p], step[p], vjp.samples[p], use_reentrant=False) for p in pieces]
            return torch.cat([part for part in parts if isinstance(part, Tensor)])

        drift = draw_drift(system, _select_noise(problem, samples))
        states = torch.stack(serial_chain(system.schedule, noise.flatten(1).to(system.dtype), predict, drift))
        shape = (system.batch, *system.shape)
        trajectory = states.detach().view(-1, *shape).to(noise.dtype)
        return states[-1].view(shape).to(noise.dtype), trajectory, system.num_steps
