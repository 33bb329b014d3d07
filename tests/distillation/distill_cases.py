"""A model whose answer is known, its schedules, and solves of it with a draft."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

import deqdiff_fast as dq

SETTINGS = {"steps": 60, "measure": False}


class Exact(nn.Module):
    """The exact prediction for two Gaussians with a small spread, in any of a schedule's prediction types and times;
    a class, a vector or guidance moves their means."""

    def __init__(self, schedule: dq.Schedule, shape: tuple[int, ...], scale: float = 1.0) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(1)
        count = math.prod(shape)
        smooth = torch.randn(2, count, generator=draw).cumsum(1) / count**0.5
        self.register_buffer("means", scale * smooth)
        self.weight = nn.Parameter(torch.zeros(1))
        self.order = schedule.timesteps.double().argsort()
        self.tables = torch.stack([schedule.timesteps.double(), schedule.signal[:-1], schedule.sigma[:-1],
                                   schedule.input_scale, *schedule.denoised_coef().unbind(1)])  # fmt: skip
        self.spread, self.rows, self.scale = 0.1 * scale, 0, scale

    def forward(self, x: Tensor, t: Tensor, moved: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        self.rows += len(x)
        at = self.order[torch.searchsorted(self.tables[0, self.order], t.double()).clamp(0, len(self.order) - 1)]
        _, signal, sigma, input_scale, p, q = self.tables[:, at, None]
        y = x.double().flatten(1) / input_scale
        shift = 0.0 if moved is None else moved.double()
        shift = shift if labels is None else shift + self.scale * labels.double()[:, None]
        means = signal[..., None] * (self.means[None] + (shift[:, None] if isinstance(shift, Tensor) else 0.0))
        variance = signal**2 * self.spread**2 + sigma**2
        offset = y[:, None] - means
        share = (-offset.square().sum(-1) / (2 * variance)).softmax(-1)[..., None]
        pulled = (share * offset).sum(1)
        eps = sigma * pulled / variance
        clean = (y - sigma * eps) / signal
        return ((clean - p * y) / q).view_as(x).to(x.dtype)


def ddpm(steps: int, kind: str = "epsilon") -> dq.Schedule:
    alphas = (1 - torch.linspace(1e-3, 0.12, 100, dtype=torch.float64)).cumprod(0)
    return dq.Schedule.ddim(alphas, torch.arange(steps).flip(0) * (100 // steps), prediction_type=kind)


def apart(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def solved(model, schedule, draft, shape, **kwargs) -> dq.Solution:
    """Two samples by the draft; they are the serial chain's."""
    noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(3)) * schedule.init_noise_sigma
    sampler = dq.DEQSampler(model, schedule, solver="draft", draft=draft)
    with torch.no_grad():
        found, exact = sampler.sample(noise, kwargs or None), sampler.serial(noise, kwargs or None)
    assert bool(found.converged.all())
    assert apart(found.sample, exact.sample) < 1e-2
    assert found.stats.draft_evals > 0
    return found
