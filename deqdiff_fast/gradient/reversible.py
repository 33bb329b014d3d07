"""Reversible: the exact gradient of the computed iteration in constant memory (RevDEQ, arXiv 2509.12917).

    y+ = (1 - b) y + b f(z),    z+ = (1 - b) z + b f(y+)

can be run backwards from its last (y, z) alone, so nothing is stored of the rounds:

    z = (z+ - b f(y+)) / (1 - b),    y = (y+ - b f(z)) / (1 - b).

f is the plain round with the scalar slope. Both directions evaluate f at the same rows in the same chunks, so what is
lost is rounding, and every reversed round amplifies it by about 1 / |1 - b|. So y and z are float64 whatever the
model's dtype is, and ANCHORS pairs of them are stored, from which the reversal goes on afresh: a fixed number, at
rounds so far apart that rounding grows by GROWTH between them, which bounds the rounds there can be. Every backward
pass measures how far the reversal misses the known start, weighs it with the cotangents there, which have shrunk by
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

from .._devices import hidden_in_backward, hidden_settings
from ..errors import ConvergenceWarning
from ..solution import Solution
from .base import Problem, Relaxed
from .batched_vjp import BatchedVJP, apart
from .first_order import first_order
from .fixed_point_map import FixedPointMap
from .monitor import IterationMonitor

GROWTH = 1e5  # of float64 rounding (1e-16) on the way back: far below what a float32 model can tell apart
ANCHORS = 2
MISSED = 1e-3  # relative error of a gradient beyond which a warning is due


@dataclass(frozen=True)
class Reversible(Relaxed):
    """The exact gradient of a reversible iteration, in memory that does not grow with its rounds (arXiv 2509.12917).

    The sample is that of this iteration (two model calls on all timesteps a round), at the sampler's tolerance. It ends
    after `max_rounds` or where the stored pairs of states are used up (21 rounds at 0.8); what then, the sampler's
    `on_failure` says ("serial": the serial chain with the implicit gradient). Backward warns (`ConvergenceWarning`)
    where rounding may have spoilt the gradient.

    Args:
        relaxation: b in (0, 2), not 1. Near 1 it converges faster and loses more digits per reversed round.

    Raises:
        ValueError: `relaxation` is out of its range.
    """

    def segment(self) -> int:
        """The rounds over which rounding errors, reversed, grow by GROWTH."""
        return max(1, int(math.log(GROWTH) / -math.log(abs(1 - self.relaxation))))

    def attach(self, problem: Problem) -> Solution:
        """Run the reversible iteration; backward reverses it. See `Gradient.attach`."""
        bound = self.segment() * (ANCHORS + 1)
        monitor = IterationMonitor(problem, self.name, min(bound, problem.max_rounds or bound))
        leaves = BatchedVJP(problem.system, problem.system.model_kwargs).kwarg_leaves
        run = _Run(problem, FixedPointMap(problem), self.relaxation, self.segment(), monitor, len(leaves))
        states: list[Tensor] = []
        attach: Callable[..., Tensor] = _Iteration.apply
        with monitor.bar:
            sample = attach(run, states, problem.noise, *leaves, *problem.parameters)
        return monitor.conclude(sample, states[0], run.f.drift)


@dataclass
class _Run:
    problem: Problem
    f: FixedPointMap
    relaxation: float
    segment: int
    monitor: IterationMonitor
    count: int  # tensors of model_kwargs among the leaves

    def vjp(self, leaves: Sequence[Tensor]) -> BatchedVJP:
        system = self.problem.system
        return BatchedVJP(system, system.model_kwargs, leaves[: self.count])

    def noise(self, noise: Tensor) -> Tensor:
        if noise.device.type == "mps":
            raise ValueError("gradient: 'reversible' needs float64, which MPS does not have; use 'implicit'")
        return noise.detach().flatten(1).to(torch.float64, copy=True)  # it may be an inference tensor


class _Iteration(Function):
    @staticmethod
    def forward(ctx: Any, run: _Run, states: list[Tensor], noise: Tensor, *leaves: Tensor) -> Tensor:
        """The last states go to `states` too."""
        vjp, f, b, monitor = run.vjp(leaves), run.f, run.relaxation, run.monitor
        first = run.noise(noise)
        y = f.initial_states(first)
        z = y.clone()
        rounds, anchors = 0, []
        while rounds < monitor.limit:
            if rounds and rounds % run.segment == 0:
                anchors += [y, z]
            rounds += 1
            predictions = vjp.predictions(z[:-1])
            new = f.scan(first, z, predictions)
            ended = monitor.update(z, new, predictions)
            y = (1 - b) * y + b * new
            z = (1 - b) * z + b * f.scan(first, y, vjp.predictions(y[:-1]))
            if ended:
                break
        ctx.run, ctx.rounds, ctx.noise, ctx.settings = run, rounds, noise, hidden_settings()
        ctx.save_for_backward(y, z, first, *leaves, *anchors)
        states.append(z)
        return z[-1].view(noise.shape).to(noise.dtype)

    @staticmethod
    @first_order
    @hidden_in_backward
    def backward(ctx: Any, grad: Tensor) -> Any:
        y, z, first, *rest = ctx.saved_tensors
        run, b = ctx.run, ctx.run.relaxation
        leaves, anchors = rest[: len(ctx.needs_input_grad) - 3], rest[len(ctx.needs_input_grad) - 3 :]
        leaves[: run.count] = apart(leaves[: run.count])
        vjp, needed = run.vjp(leaves), ctx.needs_input_grad[3:]
        wanted = [leaf for leaf, need in zip(leaves, needed) if need]
        sums = [torch.zeros_like(leaf) for leaf in wanted]
        to_y, to_z, to_noise = torch.zeros_like(y), torch.zeros_like(z), torch.zeros_like(first)
        to_z[-1] = grad.flatten(1)
        for left in reversed(range(ctx.rounds)):
            value, to_states, to_first = _vjp_of_map(run.f, vjp, first, y, b * to_z, wanted, sums)
            z, to_z, to_y, to_noise = (z - b * value) / (1 - b), (1 - b) * to_z, to_y + to_states, to_noise + to_first
            value, to_states, to_first = _vjp_of_map(run.f, vjp, first, z, b * to_y, wanted, sums)
            y, to_y, to_z, to_noise = (y - b * value) / (1 - b), (1 - b) * to_y, to_z + to_states, to_noise + to_first
            if left and left % run.segment == 0:
                y, z = anchors[2 * (left // run.segment) - 2 :][:2]
        with torch.enable_grad():
            leaf = first.detach().requires_grad_(True)
            guess = run.f.initial_states(leaf)
            (to_first,) = torch.autograd.grad(guess, leaf, to_y + to_z)
        _check(guess.detach(), y, z, float((to_y.norm() + to_z.norm()) / grad.norm()), b)
        found = iter(sums)
        grads = [next(found) if need else None for need in needed]
        return (None, None, (to_noise + to_first).view_as(grad).to(grad.dtype), *grads)


def _vjp_of_map(
    f: FixedPointMap, vjp: BatchedVJP, noise: Tensor, states: Tensor, cotangent: Tensor, leaves: Sequence[Tensor],
    sums: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """f(states), and the cotangents of states and noise from that of f(states); adds those of `leaves` to `sums`."""
    with torch.no_grad():  # as on the way there: kernels may differ by rounding where gradients are recorded
        predictions = vjp.predictions(states[:-1])
    with torch.enable_grad():
        inputs = [t.detach().requires_grad_(True) for t in (noise, states, predictions)]
        value = f.scan(*inputs)
        to_noise, to_states, to_predictions = torch.autograd.grad(value, inputs, cotangent, materialize_grads=True)
    to_rows, grads = vjp.vjp_sums(states[:-1], to_predictions, leaves, to_states=True)
    to_states[:-1] += to_rows
    for total, grad in zip(sums, grads):
        total.add_(grad)
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
