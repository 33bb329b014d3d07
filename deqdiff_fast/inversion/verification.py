"""How good an inversion is, by the serial chain, and a second attempt where a method was wrong about it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..errors import NonFiniteError
from ..model.weighted_norm import WeightedNorm
from ..sampler import DEQSampler
from ..solver.picard import Picard
from .base import InversionProblem, Method, MethodResult

ATTEMPTS = 3
MARGIN = 0.5  # of the tolerance: what another attempt aims at


def reconstruct(problem: InversionProblem, noise: Tensor) -> tuple[Tensor, Tensor, int]:
    """Run the serial chain from the noise, (B, *shape).

    Returns:
        Its sample (B, *shape), the sample's relative error (B,) and the number of model evaluations. A chain that
        overflows has error Inf, and zeros for its sample.
    """
    serial = DEQSampler(
        problem.model, problem.schedule, solver=Picard(), max_batch=problem.max_batch, backend=problem.backend,
        memory=problem.memory,
    )  # fmt: skip
    try:
        solution = serial.serial(noise, problem.model_kwargs, problem.generators())
    except NonFiniteError:
        if problem.batch == 1:
            return torch.zeros_like(noise), torch.full((1,), float("inf"), dtype=torch.float64), 0
        whole = problem.with_frozen_noise()
        parts = [reconstruct(whole.select(torch.tensor([b])), noise[b : b + 1]) for b in range(problem.batch)]
        samples, errors, counts = zip(*parts)
        return torch.cat(samples), torch.cat(errors), sum(counts)
    return solution.sample, relative_error(solution.sample, problem.image, problem.norm), solution.stats.model_evals


def verify_and_refine(problem: InversionProblem, method: Method, result: MethodResult) -> tuple[Tensor, Tensor]:
    """Measure a result and improve, in place, the samples that the method wrongly believes to hold.

    Returns:
        The reconstruction (B, *shape) and its relative error (B,).
    """
    sample, error, count = reconstruct(problem, result.noise)
    result.stats.verify_evals += count
    tol = problem.tol
    for _ in range(1, ATTEMPTS):
        wrong = ((error > problem.tol) & error.isfinite() & result.converged).nonzero().flatten()
        if not method.exact or result.trajectory is None or len(wrong) == 0:
            break
        tol = max(MARGIN * tol * problem.tol / float(error[wrong].max()), 1e-3 * problem.tol)
        part = replace(replace(problem, init_trajectory=result.trajectory).select(wrong), tol=tol)
        again = method.solve(part)
        new_sample, new_error, count = reconstruct(part, again.noise)
        result.stats.verify_evals += count
        result.stats.notes.append(f"{len(wrong)} samples taken further: their measured error was above the tolerance")
        result.stats.add(again.stats)
        better = (new_error < error[wrong]).nonzero().flatten()
        target, source = wrong[better].to(sample.device), better.to(sample.device)
        sample[target], result.noise[target] = new_sample[source], again.noise[source]
        error[wrong[better]] = new_error[better]
        if again.trajectory is not None:
            result.trajectory[:, target] = again.trajectory[:, source]
    if method.exact and result.stats.stop_reason == "converged" and not bool((error <= problem.tol).all()):
        result.stats.stop_reason = "max_rounds"
    return sample, error


def relative_error(sample: Tensor, reference: Tensor, norm: WeightedNorm | None = None) -> Tensor:
    """(B,) float64 on the CPU: |sample - reference| / |reference| over each image, in L2 or that norm."""
    a, b = (x.detach().cpu().double().flatten(1) for x in (sample, reference))
    if norm is not None:
        a, b = norm.forward(a.clone()), norm.forward(b.clone())
    error: Tensor = (a - b).norm(dim=1) / b.norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny)
    return error
