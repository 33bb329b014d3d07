"""A small model of classes, and folders of pairs made with it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

import deqdiff_fast as dq
from deqdiff_fast.distillation import Pairs

SHAPE = (2, 3, 3)


class Tiny(nn.Module):
    """A small perceptron; a class moves its answer."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.one, self.two, self.classes = nn.Linear(19, 32), nn.Linear(32, 18), nn.Embedding(5, 18)
        self.requires_grad_(False)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        hidden = self.one(torch.cat([x.flatten(1), t[:, None].to(x.dtype) / 1000], 1)).tanh()
        said = self.two(hidden) if labels is None else self.two(hidden) + 0.3 * self.classes(labels)
        return said.view_as(x)


def ddim(steps: int, eta: float = 0.0) -> dq.Schedule:
    alphas = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    return dq.Schedule.ddim(alphas, torch.arange(steps).flip(0) * (1000 // steps), eta=eta)


def make(folder: Path, count: int = 150, model: nn.Module | None = None, **settings) -> Pairs:
    given = {"method": "serial", "batch": 16, **settings}
    return Pairs.make(model or Tiny(), given.pop("schedule", ddim(8)), SHAPE, count, folder, **given)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def apart(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())
