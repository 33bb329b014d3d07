"""The model on (timestep, sample) rows and its vector-Jacobian products, a chunk of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..engine.system import System

CHUNK = 64  # rows in one call that stores its activations


def apart(leaves: Sequence[Tensor]) -> list[Tensor]:
    """Leaves of their own on the same memory: one tensor may be given twice, or be made of others."""
    return [leaf.detach().requires_grad_() for leaf in leaves]


class BatchedVJP:
    """Differentiable predictions of one system, and products with their Jacobians J.

    Args:
        model_kwargs: the system's, as they were before a solve, which may put its own copies in their place.
        leaves: stand-ins for the tensors in `model_kwargs` that need a gradient, in their order (None: themselves).
    """

    def __init__(self, system: System, model_kwargs: dict[str, Any], leaves: Sequence[Tensor] | None = None) -> None:
        self.system = system
        values, structure = tree_flatten(model_kwargs)
        self.kwarg_leaves = [value for value in values if isinstance(value, Tensor) and value.requires_grad]
        given = iter(self.kwarg_leaves if leaves is None else leaves)
        filled = [next(given) if isinstance(x, Tensor) and x.requires_grad else x for x in values]
        self.kwargs = tree_unflatten(filled, structure)
        self.samples = torch.arange(system.batch, device=system.device)

    def predict(self, x: Tensor, step: Tensor, sample: Tensor) -> Tensor:
        """(n, D) predictions at states x: (n, D) of timesteps and samples (n,), differentiable."""
        return self.system.predict(x, step, self.system.select(self.kwargs or {}, sample))

    def predict_step(self, x: Tensor, i: int) -> Tensor:
        """(B, D) predictions of all samples at step i, in one call: what `serial_chain` asks for."""
        return self.predict(x, torch.full_like(self.samples, i), self.samples)

    def predictions(self, states: Tensor) -> Tensor:
        """(T, B, D) predictions at states (T, B, D), differentiable."""
        parts = [self.predict(states[step, sample], step, sample) for step, sample in self._chunks()]
        return torch.cat(parts).view_as(states)

    def vjp(self, x: Tensor, step: Tensor, sample: Tensor, y: Tensor) -> Tensor:
        """J^T y of the predictions at x, both (n, D)."""
        parts = []
        for start, stop in self.system.chunks(len(x)):
            p = slice(start, stop)
            (grad,) = self._vjp_rows(x[p], step[p], sample[p], y[p], [], True)
            parts.append(torch.zeros_like(y[p]) if grad is None else grad.to(y.dtype))
        return torch.cat(parts)

    def vjp_sums(
        self, states: Tensor, cotangents: Tensor, leaves: Sequence[Tensor], to_states: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """Products of all rows at once with cotangents of the predictions at states, both (T, B, D).

        Returns:
            J^T cotangents, (T, B, D), zeros unless `to_states`; and for every leaf the product with the predictions'
            Jacobian with respect to it, summed over all rows.
        """
        to_rows = torch.zeros_like(cotangents)
        sums = [torch.zeros_like(leaf) for leaf in leaves]
        if not (leaves or to_states):
            return to_rows, sums
        for step, sample in self._chunks():
            grads = self._vjp_rows(states[step, sample], step, sample, cotangents[step, sample], leaves, to_states)
            if to_states and (grad := grads.pop(0)) is not None:
                to_rows[step, sample] = grad.to(to_rows.dtype)
            for total, grad in zip(sums, grads):
                if grad is not None:
                    total.add_(grad)
        return to_rows, sums

    def _vjp_rows(
        self, x: Tensor, step: Tensor, sample: Tensor, y: Tensor, leaves: Sequence[Tensor], to_states: bool
    ) -> list[Tensor | None]:
        """Products of one chunk with y: (n, D), for the states x if `to_states`, then the leaves; None for zero."""
        with torch.enable_grad():
            x = x.detach().requires_grad_(to_states)
            out = self.predict(x, step, sample)
            inputs = [x, *leaves] if to_states else list(leaves)
            if not out.requires_grad:
                return [None] * len(inputs)
            return list(torch.autograd.grad(out, inputs, y.to(out.dtype), allow_unused=True))

    def _chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(step, sample) of all rows, timestep-major."""
        system = self.system
        count, size = system.num_steps * system.batch, min(CHUNK, system.max_batch or CHUNK)
        for start in range(0, count, size):
            row = torch.arange(start, min(start + size, count), device=system.device)
            yield row // system.batch, row % system.batch
