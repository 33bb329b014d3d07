"""Reversible: the exact gradient of the computed iteration in constant memory (RevDEQ, arXiv 2509.12917).

    y+ = (1 - b) y + b f(z),    z+ = (1 - b) z + b f(y+)

can be run backwards from its last (y, z) alone, so nothing is stored of the rounds:

    z = (z+ - b f(y+)) / (1 - b),    y = (y+ - b f(z)) / (1 - b).

f is the plain round with the scalar slope. Both directions evaluate f at the same rows in the same chunks, so what is
lost is rounding, and every reversed round amplifies it by about 1 / |1 - b|. So y and z are float64 whatever the
model's dtype is, and ANCHORS pairs of them are kept, from which the reversal goes on afresh: a fixed number, at rounds
so far apart that rounding grows by GROWTH between them, which bounds the rounds there can be. Every backward pass
measures how far the reversal misses the known start, weighs it with the cotangents there, which have shrunk by
|1 - b|^rounds, and warns if that is not small.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ..errors import ConvergenceWarning
from ..solution import Solution
from .base import Problem
from .implicit import Implicit
from .rounds import RoundMap, Watch, finish_serially, frozen_noise, start
from .rows import Rows

GROWTH = 1e5  # of float64 rounding (1e-16) on the way back: far below what a float32 model can tell apart
ANCHORS = 2
MISSED = 1e-3  # relative error of a gradient beyond which a warning is due


@dataclass(frozen=True)
class Reversible:
    """relaxation: b in (0, 2), not 1. Near 1 it converges faster and loses more digits per reversed round.

    The sample is that of this iteration (two model calls on all timesteps a round), at the sampler's tolerance. It ends
    after `max_rounds` or where the anchors are used up (21 rounds at 0.8); what then, the sampler's `on_failure` says
    ("serial": the serial chain with the implicit gradient).
    """

    relaxation: float = 0.8

    def __post_init__(self) -> None:
        b = self.relaxation
        if isinstance(b, bool) or not isinstance(b, (int, float)) or not 0 < b < 2 or b == 1:
            raise ValueError(f"relaxation: expected a number in (0, 2) other than 1, got {b!r}")

    @property
    def name(self) -> str:
        return f"reversible(relaxation={self.relaxation:g})"

    def segment(self) -> int:
        """The rounds over which rounding errors, reversed, grow by GROWTH."""
        return max(1, int(math.log(GROWTH) / -math.log(abs(1 - self.relaxation))))

    def attach(self, problem: Problem) -> Solution:
        drift, bound = frozen_noise(problem), self.segment() * (ANCHORS + 1)
        limit = min(bound, problem.max_rounds or bound)
        f, tensors = RoundMap(problem.system, drift), Rows(problem.system, problem.system.model_kwargs).tensors
        held: list[Solution] = []
        with Watch(problem, self.name, limit) as watch:
            attach: Callable[..., Tensor] = _Iteration.apply
            run = _Run(problem, f, self.relaxation, self.segment(), watch, len(tensors))
            sample = attach(run, held, problem.noise, *tensors, *problem.parameters)
        if watch.failed and problem.on_failure == "serial":
            return Implicit().attach(finish_serially(problem, watch, drift))
        solution = held[0]
        solution.sample = sample
        return solution


@dataclass
class _Run:
    problem: Problem
    f: RoundMap
    relaxation: float
    segment: int
    watch: Watch
    count: int  # tensors of model_kwargs among the leaves

    def rows(self, leaves: Sequence[Tensor]) -> Rows:
        system = self.problem.system
        return Rows(system, system.model_kwargs, leaves[: self.count])

    def noise(self, noise: Tensor) -> Tensor:
        return noise.detach().flatten(1).double()


class _Iteration(Function):
    @staticmethod
    def forward(ctx: Any, run: _Run, held: list[Solution], noise: Tensor, *leaves: Tensor) -> Tensor:
        rows, f, b, watch = run.rows(leaves), run.f, run.relaxation, run.watch
        first = run.noise(noise)
        y = start(run.problem, f, first)
        z = y.clone()
        rounds, anchors = 0, []
        while rounds < watch.limit:
            if rounds and rounds % run.segment == 0:
                anchors += [y, z]
            rounds += 1
            predictions = rows.predictions(z[:-1])
            new = f.scan(first, z, predictions)
            ended = watch(z, new, predictions)
            y = (1 - b) * y + b * new
            z = (1 - b) * z + b * f.scan(first, y, rows.predictions(y[:-1]))
            if ended:
                break
        ctx.run, ctx.rounds = run, rounds
        ctx.save_for_backward(y, z, noise, *leaves, *anchors)
        failed = watch.failed and run.problem.on_failure == "serial"
        if not failed:
            held.append(watch.solution(z[-1], z))
        return z[-1].view(noise.shape).to(noise.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        y, z, noise, *rest = ctx.saved_tensors
        run, b = ctx.run, ctx.run.relaxation
        leaves, anchors = rest[: len(ctx.needs_input_grad) - 3], rest[len(ctx.needs_input_grad) - 3 :]
        rows, first = run.rows(leaves), run.noise(noise)
        needed = ctx.needs_input_grad[3:]
        wanted = [leaf for leaf, need in zip(leaves, needed) if need]
        total = [torch.zeros_like(leaf) for leaf in wanted]
        to_y, to_z, to_noise = torch.zeros_like(y), torch.zeros_like(z), torch.zeros_like(first)
        to_z[-1] = grad.flatten(1)
        for left in reversed(range(ctx.rounds)):
            value, back, to_first = _pull_back(run.f, rows, first, y, b * to_z, wanted, total)
            z, to_z, to_y, to_noise = (z - b * value) / (1 - b), (1 - b) * to_z, to_y + back, to_noise + to_first
            value, back, to_first = _pull_back(run.f, rows, first, z, b * to_y, wanted, total)
            y, to_y, to_z, to_noise = (y - b * value) / (1 - b), (1 - b) * to_y, to_z + back, to_noise + to_first
            if left and left % run.segment == 0:
                y, z = anchors[2 * (left // run.segment) - 2 :][:2]
        with torch.enable_grad():
            leaf = first.requires_grad_(True)
            guess = start(run.problem, run.f, leaf)
            (to_first,) = torch.autograd.grad(guess, leaf, to_y + to_z)
        _check(guess.detach(), y, z, float((to_y.norm() + to_z.norm()) / grad.norm()), b)
        found = iter(total)
        grads = [next(found) if need else None for need in needed]
        return (None, None, (to_noise + to_first).view(noise.shape).to(grad.dtype), *grads)


def _pull_back(
    f: RoundMap, rows: Rows, noise: Tensor, states: Tensor, cotangent: Tensor, wanted: Sequence[Tensor],
    total: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """f(states), and the cotangents of states and noise from that of f(states); adds those of `wanted` to `total`."""
    with torch.no_grad():  # as on the way there: kernels may differ by rounding where gradients are recorded
        predictions = rows.predictions(states[:-1])
    with torch.enable_grad():
        inputs = [t.detach().requires_grad_(True) for t in (noise, states, predictions)]
        value = f.scan(*inputs)
        to_noise, to_states, weights = torch.autograd.grad(value, inputs, cotangent, materialize_grads=True)
    back, grads = rows.pull_back(states[:-1], weights, wanted, to_states=True)
    to_states[:-1] += back
    for sum_, grad in zip(total, grads):
        sum_.add_(grad)
    return value.detach(), to_states, to_noise


def _check(guess: Tensor, y: Tensor, z: Tensor, left: float, relaxation: float) -> None:
    """Warn where the way back did not lead to the start; left: size of the cotangents there, relative to the first."""
    missed = float(torch.maximum((y - guess).norm(), (z - guess).norm()) / guess.norm())
    if not missed * left <= MISSED:
        warnings.warn(
            f"reversible: run backwards, the iteration missed its start by {missed:.1e} (relative), so that this "
            f"gradient may be off by {missed * left:.1e}; loosen tol, lower max_rounds, or take a relaxation farther "
            f"from 1 than {relaxation:g}",
            ConvergenceWarning,
            stacklevel=2,
        )
