"""A small diffusion policy: an MLP that denoises short action sequences, fitted in a few seconds."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

import deqdiff_fast as dq

from ._problems import ABAR, TRAIN_STEPS, Problem

HORIZON, ACTIONS = 16, 7


def demonstrations(count: int, draw: torch.Generator) -> Tensor:
    """(count, HORIZON, ACTIONS): smooth reaches that pass an obstacle left or right, and a little noise."""
    time = torch.linspace(0, 1, HORIZON)[:, None]
    goal = 0.5 * torch.randn(count, 1, ACTIONS, generator=draw)
    side = torch.randint(0, 2, (count, 1, 1), generator=draw) * 2.0 - 1
    reach = goal * (3 * time**2 - 2 * time**3)
    detour = 0.6 * side * torch.sin(math.pi * time) * torch.linspace(1, -1, ACTIONS)
    return reach + detour + 0.02 * torch.randn(count, HORIZON, ACTIONS, generator=draw)


class Policy(nn.Module):
    """v(x, t) for x: (n, HORIZON, ACTIONS): little training makes a sane chain of it, unlike of epsilon."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        size = HORIZON * ACTIONS
        self.register_buffer("rates", torch.exp(-math.log(1e4) * torch.arange(32) / 32))
        layers: list[nn.Module] = [nn.Linear(size + 64, width), nn.SiLU()]
        for _ in range(2):
            layers += [nn.Linear(width, width), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(width, size))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angle = t.to(x.dtype)[:, None] * self.rates
        out: Tensor = self.layers(torch.cat([x.flatten(1), angle.sin(), angle.cos()], dim=1))
        return out.view_as(x)


def fitted(steps: int = 1000, batch: int = 256, seed: int = 0) -> Policy:
    """A policy fitted to `demonstrations` with the v loss; the same weights whenever it is asked for."""
    draw = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy = Policy()
    optimizer = torch.optim.Adam(policy.parameters(), lr=2e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        clean, t = demonstrations(batch, draw), torch.randint(0, TRAIN_STEPS, (batch,), generator=draw)
        eps = torch.randn(clean.shape, generator=draw)
        alpha, sigma = ABAR[t].sqrt().float()[:, None, None], (1 - ABAR[t]).sqrt().float()[:, None, None]
        loss = (policy(alpha * clean + sigma * eps, t) - (alpha * eps - sigma * clean)).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        decay.step()
    return policy.eval().requires_grad_(False)


def problem(device: str, fit: int = 1000) -> Problem:
    """The policy after that many training steps, with DDIM on the linear noise schedule; eta 1 is DDPM."""

    def schedule(steps: int, eta: float) -> dq.Schedule:
        timesteps = torch.arange(steps).flip(0) * (TRAIN_STEPS // steps)
        return dq.Schedule.ddim(ABAR, timesteps, eta=eta, prediction_type="v_prediction")

    return Problem("policy", fitted(fit).to(device), schedule, (HORIZON, ACTIONS), device)
