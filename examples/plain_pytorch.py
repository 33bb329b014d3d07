"""The smallest change to a sampling loop of your own: keep the model and the noise levels, drop the loop.

    python examples/plain_pytorch.py

The model is the exact denoiser of a mixture of 64 Gaussians on two rings, with a label that says which ring; guidance
pushes the samples towards it. Any `model(x, t, ...)` that treats the rows of a batch independently takes its place.

Needs: torch, deqdiff_fast.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

import deqdiff_fast as dq

ABAR = (1 - torch.linspace(1e-4, 0.02, 1000)).cumprod(0)
TIMESTEPS = torch.arange(0, 1000, 20).flip(0)  # 50 steps
ANGLES = torch.arange(32) * (2 * math.pi / 32)
RING = torch.stack([ANGLES.cos(), ANGLES.sin()], dim=1)
VARIANCE = 1e-3


def model(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
    """eps for x: (n, 2), t: (n,), label: (n,), 0 or 1 for one of the rings and -1 for either."""
    points = torch.cat([0.5 * RING, 1.5 * RING])
    abar = ABAR[t][:, None]
    spread = abar * VARIANCE + 1 - abar
    far = (x[:, None] - abar.sqrt()[..., None] * points).square().sum(-1)
    allowed = (label[:, None] < 0) | (torch.arange(64)[None] // 32 == label[:, None])
    share = (-far / (2 * spread)).masked_fill(~allowed, -math.inf).softmax(1)
    return (1 - abar).sqrt() * (x - abar.sqrt() * (share @ points)) / spread


def loop(x: Tensor, label: Tensor, scale: float) -> Tensor:
    """DDIM with classifier-free guidance, as one writes it by hand."""
    for i, t in enumerate(TIMESTEPS):
        now = ABAR[t]
        after = ABAR[TIMESTEPS[i + 1]] if i + 1 < len(TIMESTEPS) else torch.tensor(1.0)
        times = t.expand(len(x))
        free, wanted = model(x, times, torch.full_like(label, -1)), model(x, times, label)
        eps = free + scale * (wanted - free)
        clean = (x - (1 - now).sqrt() * eps) / now.sqrt()
        x = after.sqrt() * clean + (1 - after).sqrt() * eps
    return x


@torch.no_grad()
def main() -> None:
    noise = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    label = torch.tensor([0, 1, 0, 1])
    expected = loop(noise, label, scale=2.0)

    schedule = dq.Schedule.ddim(ABAR, TIMESTEPS)
    guided = dq.guided(model, {"label": label}, {"label": torch.tensor([-1])}, scale=2.0)
    sampler = dq.DEQSampler(guided, schedule, solver="quasi-newton")  # "auto" might find the serial chain faster here
    out = sampler.sample(noise)

    error = float(((out.sample - expected).norm(dim=1) / expected.norm(dim=1)).max())
    print(f"loop:     {len(TIMESTEPS)} steps, 2 model calls each")
    print(f"parallel: {out.stats.rounds} rounds, one model call each, largest error {error:.1e}")
    print("radius:", ", ".join(f"{radius:.2f}" for radius in out.sample.norm(dim=1).tolist()), "for labels 0, 1, 0, 1")


if __name__ == "__main__":
    main()
