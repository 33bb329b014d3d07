"""The differentiable chains that a descent can go through: solved in parallel, or the serial one."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from .._types import FrozenNoise
from ..engine.system import System
from ..errors import ConvergenceWarning
from ..gradient.base import Gradient
from ..gradient.batched_vjp import BatchedVJP
from ..gradient.fixed_point_map import draw_drift
from ..loop.base import Solver
from ..sampler import DEQSampler
from ..schedule.chain import serial_chain
from ..solver import resolve
from .base import Task

Chain = Callable[[Tensor, Tensor, "Tensor | None"], "tuple[Tensor, Tensor, int]"]
"""`chain(noise, who, init)`: noise (n, *shape) of the images `who` (n,), the trajectory to start from -> the sample,
its trajectory (T + 1, n, *shape) and the number of model calls that waited for each other."""


def select_kwargs(model_kwargs: dict[str, Any] | None, who: Tensor, batch: int) -> dict[str, Any] | None:
    """model_kwargs of some of the samples: tensors whose first dimension is the batch's belong to the samples."""

    def pick(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == batch:
            return value.index_select(0, who.to(value.device))
        return value

    picked: dict[str, Any] | None = tree_map(pick, model_kwargs)
    return picked


def _frozen(task: Task, who: Tensor) -> FrozenNoise | None:
    return task.generator.select(who) if isinstance(task.generator, FrozenNoise) else None


class ParallelChain:
    """`DEQSampler.sample` with a gradient mode."""

    def __init__(self, task: Task, solver: str | Solver, tol: float | None, gradient: Gradient, finish: bool) -> None:
        self.task = task
        spectral = getattr(resolve(solver), "slope", None) in ("auto", "spectral")
        self.sampler = DEQSampler(
            task.model, task.schedule, solver=solver, tol=tol, window=task.window, backend=task.backend,
            gradient=gradient, max_batch=task.max_batch, spectrum=task.spectrum if spectral else None,
            memory=task.memory, on_failure="serial" if finish else "warn",
        )  # fmt: skip

    def __call__(self, noise: Tensor, who: Tensor, init: Tensor | None) -> tuple[Tensor, Tensor, int]:
        kwargs = select_kwargs(self.task.model_kwargs, who, self.task.batch)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # what is found in the end is measured in any case
            solution = self.sampler.sample(
                noise, kwargs, _frozen(self.task, who), init_trajectory=init, return_trajectory=True
            )
        assert solution.trajectory is not None
        stats = solution.stats
        rounds = stats.rounds + (stats.finished_serially if stats.stop_reason != "serial" else 0)
        return solution.sample, solution.trajectory.detach(), rounds


class SerialChain:
    """The serial chain, its activations recomputed on the way back, one step at a time (Chen et al. 2016)."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def __call__(self, noise: Tensor, who: Tensor, init: Tensor | None) -> tuple[Tensor, Tensor, int]:
        task = self.task
        kwargs = select_kwargs(task.model_kwargs, who, task.batch)
        system = System(task.model, task.schedule, noise, kwargs, task.max_batch)
        vjp = BatchedVJP(system, system.model_kwargs)

        def predict(x: Tensor, i: int) -> Tensor:
            step = torch.full_like(vjp.samples, i)
            pieces = [slice(start, stop) for start, stop in system.chunks(len(x))]
            parts = [checkpoint(vjp.predict, x[p], step[p], vjp.samples[p], use_reentrant=False) for p in pieces]
            return torch.cat([part for part in parts if isinstance(part, Tensor)])

        drift = draw_drift(system, _frozen(task, who))
        states = torch.stack(serial_chain(system.schedule, noise.flatten(1).to(system.dtype), predict, drift))
        shape = (system.batch, *system.shape)
        trajectory = states.detach().view(-1, *shape).to(noise.dtype)
        return states[-1].view(shape).to(noise.dtype), trajectory, system.num_steps
