"""The model on (timestep, sample) rows, with the products that gradients are made of, a chunk of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..engine.system import System

CHUNK = 64  # rows in one call that stores its activations


class Rows:
    """Rows of one system. tensors: what stands for the tensors that need a gradient in `model_kwargs`, in their order.

    model_kwargs: the system's, as they were before a solve, which may put its own copies in their place.
    """

    def __init__(self, system: System, model_kwargs: dict[str, Any], tensors: Sequence[Tensor] | None = None) -> None:
        self.system = system
        leaves, structure = tree_flatten(model_kwargs)
        self.tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
        given = iter(self.tensors if tensors is None else tensors)
        filled = [next(given) if isinstance(x, Tensor) and x.requires_grad else x for x in leaves]
        self.kwargs = tree_unflatten(filled, structure)

    def predict(self, x: Tensor, step: Tensor, sample: Tensor) -> Tensor:
        """(n, D) predictions at states x: (n, D) of timesteps and samples (n,), differentiable."""
        held, self.system.model_kwargs = self.system.model_kwargs, self.kwargs
        try:
            return self.system.predict(x, step, self.system.expand_kwargs(sample))
        finally:
            self.system.model_kwargs = held

    def predictions(self, states: Tensor) -> Tensor:
        """(T, B, D) predictions at states (T, B, D), differentiable."""
        parts = [self.predict(states[step, sample], step, sample) for step, sample in self._chunks()]
        return torch.cat(parts).view_as(states)

    def vjp(self, x: Tensor, step: Tensor, sample: Tensor, y: Tensor) -> Tensor:
        """J^T y of the predictions at x, both (n, D)."""
        pieces = [slice(first, last) for first, last in self.system.chunks(len(x))]
        return torch.cat([self._vjp(x[p], step[p], sample[p], y[p]) for p in pieces])

    def _vjp(self, x: Tensor, step: Tensor, sample: Tensor, y: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            out = self.predict(x, step, sample)
            if not out.requires_grad:
                return torch.zeros_like(y)
            (grad,) = torch.autograd.grad(out, x, y.to(out.dtype), allow_unused=True)
        return torch.zeros_like(y) if grad is None else grad.to(y.dtype)

    def pull_back(
        self, states: Tensor, weights: Tensor, wanted: Sequence[Tensor], to_states: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """With w = weights (T, B, D): J^T w at the states (T, B, D) if `to_states`, else zeros, and, summed over all
        rows, (d prediction / d leaf)^T w of every wanted leaf."""
        back = torch.zeros_like(weights)
        total = [torch.zeros_like(leaf) for leaf in wanted]
        if not (wanted or to_states):
            return back, total
        for step, sample in self._chunks():
            with torch.enable_grad():
                x = states[step, sample].detach().requires_grad_(to_states)
                out = self.predict(x, step, sample)
                if not out.requires_grad:
                    continue
                leaves = [x, *wanted] if to_states else list(wanted)
                weight = weights[step, sample].to(out.dtype)
                grads = list(torch.autograd.grad(out, leaves, weight, allow_unused=True))
            if to_states and (grad := grads.pop(0)) is not None:
                back[step, sample] = grad.to(back.dtype)
            for sum_, grad in zip(total, grads):
                if grad is not None:
                    sum_.add_(grad)
        return back, total

    def _chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(step, sample) of all rows, timestep-major."""
        system = self.system
        count, size = system.num_steps * system.batch, min(CHUNK, system.max_batch or CHUNK)
        for first in range(0, count, size):
            rank = torch.arange(first, min(first + size, count), device=system.device)
            yield rank // system.batch, rank % system.batch


def scan_adjoint(system: System, cotangent: Tensor) -> tuple[Tensor, Tensor]:
    """The transpose of the scan F = Scan(noise, predictions), cotangent: (T + 1, B, D) of F.

    Returns mu (T + 1, B, D), whose row 0 is the cotangent of the noise, and that of the predictions (T, B, D).
    """
    schedule = system.schedule
    mu, weights = cotangent.clone(), torch.zeros_like(cotangent[1:])
    for i in reversed(range(system.num_steps)):
        for lag in range(min(schedule.lags, i + 1)):
            mu[i - lag] += float(schedule.state_coef[i, lag]) * mu[i + 1]
            weights[i - lag] += float(schedule.model_coef[i, lag]) * mu[i + 1]
    return mu, weights
