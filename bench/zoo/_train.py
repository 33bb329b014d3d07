"""Denoising losses and one training loop, the usual one: Adam, a falling rate, an average of the weights."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .._common import note


@dataclass
class Batch:
    """What a network is called with, and what it should have said."""

    x: Tensor
    t: Tensor
    target: Tensor
    kwargs: dict[str, Any] = field(default_factory=dict)
    weight: Tensor | None = None
    """Like `target`: what each entry counts in the loss; None where all count alike."""

    def loss(self, net: nn.Module) -> Tensor:
        squares = (net(self.x, self.t, **self.kwargs) - self.target).square()
        return squares.mean() if self.weight is None else (squares * self.weight).sum() / self.weight.sum()


def noised(clean: Tensor, abar: Tensor, draw: torch.Generator) -> Batch:
    """Variance-preserving, eps-prediction (Ho et al. 2020, arXiv 2006.11239, equation 14). abar: (N,)."""
    t = torch.randint(0, len(abar), (len(clean),), generator=draw)
    eps = torch.randn(clean.shape, generator=draw)
    at = abar[t].float().view(-1, *[1] * (clean.dim() - 1))
    return Batch(at.sqrt() * clean + (1 - at).sqrt() * eps, t, eps)


def interpolated(clean: Tensor, draw: torch.Generator) -> Batch:
    """Flow matching on straight lines (Lipman et al. 2022, arXiv 2210.02747), times logit-normal (Esser et al. 2024,
    arXiv 2403.03206); t is 1000 times the noise's share."""
    share = torch.randn(len(clean), generator=draw).sigmoid()
    eps = torch.randn(clean.shape, generator=draw)
    s = share.view(-1, *[1] * (clean.dim() - 1))
    return Batch((1 - s) * clean + s * eps, 1000 * share, eps - clean)


@dataclass(frozen=True)
class Recipe:
    """How a model is trained. `batches(count, draw)` makes a batch."""

    build: Callable[[], nn.Module]
    batches: Callable[[int, torch.Generator], Batch]
    steps: int
    batch: int = 64
    rate: float = 2e-3
    seed: int = 0


def fit(name: str, recipe: Recipe, steps: int) -> nn.Module:
    """The model after `steps` of training, in evaluation mode; the same weights whenever it is asked for."""
    draw = torch.Generator().manual_seed(recipe.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        net = recipe.build()
    average = deepcopy(net)
    optimizer = torch.optim.Adam(net.parameters(), lr=recipe.rate)
    decay = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.rate, total_steps=max(2, steps), pct_start=0.05)
    for step in range(steps):
        loss = recipe.batches(recipe.batch, draw).loss(net)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        decay.step()
        with torch.no_grad():  # of about the last tenth
            torch._foreach_lerp_(list(average.parameters()), list(net.parameters()), 1 / min(step + 1, steps / 10 + 1))
        if (step + 1) % 200 == 0:
            note(f"training {name}: step {step + 1} of {steps}, loss {loss.item():.4f}")
    return average.eval().requires_grad_(False)
