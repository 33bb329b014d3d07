"""Small models and chains for the checks on several ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import deqdiff_fast as dq

ALPHAS = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)


class Denoiser(nn.Module):
    """Epsilon of data of unit variance, bent a little; with a condition, one a sample."""

    def __init__(self, dtype: torch.dtype = torch.float64, width: int = 6) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        draw = lambda *shape: nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype))  # noqa: E731
        self.mix, self.shift, self.width = draw(width, width), draw(width), width

    def forward(self, x: Tensor, t: Tensor, c: Tensor | None = None, level: Tensor | None = None) -> Tensor:
        sigma = (1 - ALPHAS.to(x.dtype)[t.long()]).sqrt()[:, None]
        bend = torch.tanh(x @ self.mix / self.width**0.5 + self.shift)
        y = sigma * x + 0.1 * sigma * bend
        if c is not None:
            y = y + 0.1 * sigma * c
        return y if level is None else y + 0.01 * sigma * level.sum()


def schedule(steps: int = 30, eta: float = 0.0) -> dq.Schedule:
    return dq.Schedule.ddim(ALPHAS, torch.linspace(980, 0, steps).long(), eta=eta)


def noise(batch: int, dtype: torch.dtype = torch.float64, width: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(batch, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def apart(a: Tensor, b: Tensor) -> float:
    """The largest relative L2 difference of a sample."""
    a, b = a.detach().double().flatten(1), b.detach().double().flatten(1)
    return float(((a - b).norm(dim=1) / b.norm(dim=1)).max())
