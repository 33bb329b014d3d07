"""How good an inversion is, by the serial chain, and a second attempt where a method was wrong about it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..errors import NonFiniteError
from ..sampler import DEQSampler
from ..schedule.noise import freeze
from ..solver.picard import Picard
from .base import Method, Outcome, Task
from .chains import select_kwargs

ATTEMPTS = 3
MARGIN = 0.5  # of the tolerance: what another attempt aims at


def frozen(task: Task) -> Task:
    """The same task with its noise drawn beforehand, so that it can be cut into samples."""
    shape, dtype = tuple(task.image.shape), task.image.dtype
    return replace(task, generator=freeze(task.schedule, shape, task.generators(), dtype, task.image.device))


def select(task: Task, who: Tensor) -> Task:
    """Some of the samples of a frozen task, (m,) indices on the CPU."""
    at = who.to(task.image.device)
    generator = task.generator.select(at) if task.generator is not None else None  # type: ignore[union-attr]
    kwargs = select_kwargs(task.model_kwargs, who, task.batch)
    init = None if task.init is None else task.init[:, at]
    return replace(task, image=task.image[at], model_kwargs=kwargs, generator=generator, init=init)


def reconstruct(task: Task, noise: Tensor) -> tuple[Tensor, Tensor, int]:
    """(what the serial chain makes of the noise, (B,) its relative error, model evaluations).

    A chain that overflows has error Inf, and zeros for its sample.
    """
    serial = DEQSampler(
        task.model, task.schedule, solver=Picard(), max_batch=task.max_batch, backend=task.backend, memory=task.memory
    )
    try:
        solution = serial.serial(noise, task.model_kwargs, task.generators())
    except NonFiniteError:
        if task.batch == 1:
            return torch.zeros_like(noise), torch.full((1,), float("inf"), dtype=torch.float64), 0
        whole = frozen(task)
        parts = [reconstruct(select(whole, torch.tensor([b])), noise[b : b + 1]) for b in range(task.batch)]
        samples, errors, counts = zip(*parts)
        return torch.cat(samples), torch.cat(errors), sum(counts)
    return solution.sample, relative_error(solution.sample, task.image), solution.stats.model_evals


def settle(task: Task, method: Method, outcome: Outcome) -> tuple[Tensor, Tensor]:
    """Measure an outcome, in place, and improve what a method wrongly believed to hold: (reconstruction, error)."""
    sample, error, count = reconstruct(task, outcome.noise)
    outcome.stats.verify_evals += count
    tol = task.tol
    for _ in range(1, ATTEMPTS):
        wrong = ((error > task.tol) & error.isfinite() & outcome.converged).nonzero().flatten()
        if not method.exact or outcome.trajectory is None or len(wrong) == 0:
            break
        tol = max(MARGIN * tol * task.tol / float(error[wrong].max()), 1e-3 * task.tol)
        part = replace(select(frozen(replace(task, init=outcome.trajectory)), wrong), tol=tol)
        again = method.solve(part)
        found, apart, count = reconstruct(part, again.noise)
        outcome.stats.verify_evals += count
        outcome.stats.notes.append(f"{len(wrong)} samples taken further: their measured error was above the tolerance")
        outcome.stats.add(again.stats)
        better = (apart < error[wrong]).nonzero().flatten()
        at, here = wrong[better].to(sample.device), better.to(sample.device)
        sample[at], outcome.noise[at] = found[here], again.noise[here]
        error[wrong[better]] = apart[better]
        if again.trajectory is not None:
            outcome.trajectory[:, at] = again.trajectory[:, here]
    return sample, error


def relative_error(sample: Tensor, reference: Tensor) -> Tensor:
    """(B,) float64 on the CPU: |sample - reference| / |reference|, L2 over each image."""
    a, b = sample.detach().double().cpu().flatten(1), reference.detach().double().cpu().flatten(1)
    error: Tensor = (a - b).norm(dim=1) / b.norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny)
    return error
