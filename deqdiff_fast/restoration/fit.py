"""The initial noise of a restoration, optimised: of all images that a measurement allows, one that a loss prefers.

Cao et al. 2024, arXiv 2311.11600, section 3.4: the gradient goes through the equilibrium, not through the chain.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

Loss = Callable[[Tensor], Tensor]
"""`loss(sample)` -> (B,), or () for a sum over samples that do not know each other; sample: (B, *shape)."""


@dataclass(frozen=True)
class Descent:
    """A descent on noise (B, *shape), each sample on its own.

    Args:
        loss: see `Loss`.
        steps: evaluations of the loss.
        optimizer: a torch.optim class, or a function from a list of tensors, one for each sample, to an optimizer.
        lr: learning rate of an optimizer class.
        progress: called after every step with its number and the losses (B,); returning True stops.
    """

    loss: Loss
    steps: int
    optimizer: Callable[..., Optimizer]
    lr: float
    progress: Callable[[int, Tensor], object]

    def run(self, noise: Tensor, restore: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """(the best noise of each sample, losses (steps, B) float64). restore: noise -> sample, differentiable.

        Raises:
            ValueError: the loss is not finite, or of another shape than (B,) or ().
        """
        noises = [one.detach().clone().requires_grad_() for one in noise]
        settings = {"lr": self.lr} if isinstance(self.optimizer, type) else {}
        optimizer, best, traced = self.optimizer(noises, **settings), noise.detach().clone(), list[Tensor]()
        lowest = torch.full((len(noise),), torch.inf, dtype=torch.float64, device=noise.device)
        for step in range(self.steps):
            with torch.enable_grad():
                start = torch.stack(noises)
                losses = self._losses(restore(start), len(noise))
                grads = torch.autograd.grad(losses.sum(), noises, allow_unused=True)
            now = losses.detach().double()
            better = now < lowest
            lowest = torch.where(better, now, lowest)
            best[better] = start.detach()[better]
            traced.append(now.cpu())
            if self.progress(step + 1, now) is True:
                break
            for one, grad in zip(noises, grads):
                one.grad = torch.zeros_like(one) if grad is None else grad
            optimizer.step()
        return best, torch.stack(traced)

    def _losses(self, sample: Tensor, batch: int) -> Tensor:
        losses = self.loss(sample)
        if not isinstance(losses, Tensor) or losses.shape not in ((), (batch,)):
            got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(
                f"loss: expected a tensor ({batch},), one number for each sample, or one in all, got {got}"
            )
        if not losses.requires_grad:
            raise ValueError("loss: expected one with a gradient, got one that does not depend on the sample")
        if not bool(losses.isfinite().all()):
            raise ValueError("loss: expected finite numbers, got NaN or Inf")
        return losses.expand(batch) / batch if losses.dim() == 0 else losses
