"""A diffusion policy on low-dimensional actions: train it, then sample its actions serially and in parallel.

    python examples/diffusion_policy.py

The task: a planar arm's hand moves from a start to a goal around an obstacle in the middle, on either side of it. The
policy denoises 16 actions in the plane, given start and goal (Chi et al. 2023, arXiv 2303.04137), with T = 100 DDPM
steps. It trains in half a minute on one CPU core. A call on one action sequence leaves even one core mostly idle (the
time goes into launching small operations), so the 100 calls of the chain are worth batching: that is what
`deqdiff_fast` does, with the same noise and the same actions as the serial chain.

Needs: torch, deqdiff_fast.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time

import torch
from torch import Tensor, nn

import deqdiff_fast as dq

HORIZON, ACTIONS, T = 16, 2, 100
BETAS = torch.linspace(1e-3, 0.2, T, dtype=torch.float64)
ABAR = (1 - BETAS).cumprod(0)
SIDES = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])  # where hands start, and where they go


def demonstrations(count: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Observations (count, 4), start and goal; and actions (count, HORIZON, ACTIONS) that pass the obstacle."""
    start, goal = (side + torch.randn(count, 2, generator=draw) * torch.tensor([0.2, 0.3]) for side in SIDES)
    time = torch.linspace(0, 1, HORIZON)[None, :, None]
    ease = 3 * time**2 - 2 * time**3
    side = torch.randint(0, 2, (count, 1), generator=draw) * 2.0 - 1
    bend = torch.stack([torch.zeros(count, 1), side * (0.8 + 0.1 * torch.randn(count, 1, generator=draw))], dim=2)
    actions = start[:, None] + (goal - start)[:, None] * ease + bend * torch.sin(math.pi * time)
    return torch.cat([start, goal], 1), actions


class Policy(nn.Module):
    """eps(x, t, obs): a residual MLP; x: (n, HORIZON, ACTIONS), t: (n,), obs: (n, 4)."""

    def __init__(self, width: int = 64, blocks: int = 12) -> None:
        super().__init__()
        self.register_buffer("rates", torch.exp(-math.log(1000) * torch.arange(16) / 16))
        self.inlet = nn.Linear(HORIZON * ACTIONS + 4 + 32, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
            for _ in range(blocks)
        )
        self.outlet = nn.Linear(width, HORIZON * ACTIONS)

    def forward(self, x: Tensor, t: Tensor, obs: Tensor) -> Tensor:
        angle = t[:, None] * self.rates
        h = self.inlet(torch.cat([x.flatten(1), obs, angle.sin(), angle.cos()], dim=1))
        for block in self.blocks:
            h = h + block(h)
        return self.outlet(h).view_as(x)


def train(steps: int, batch: int = 256, seed: int = 0) -> Policy:
    draw = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    policy = Policy()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=2e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        obs, actions = demonstrations(batch, draw)
        t, noise = torch.randint(0, T, (batch,), generator=draw), torch.randn(actions.shape, generator=draw)
        abar = ABAR[t].float()[:, None, None]
        loss = (policy(abar.sqrt() * actions + (1 - abar).sqrt() * noise, t, obs) - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(), decay.step()
    return policy.eval().requires_grad_(False)


@torch.inference_mode()
def serial_chain(policy: Policy, x: Tensor, obs: Tensor, generator: torch.Generator) -> Tensor:
    """The DDPM loop as a policy's author would write it."""
    for t in range(T - 1, -1, -1):
        eps = policy(x, torch.full((len(x),), t), obs)
        alpha, abar = float(1 - BETAS[t]), float(ABAR[t])
        x = (x - (1 - alpha) / math.sqrt(1 - abar) * eps) / math.sqrt(alpha)
        if t > 0:
            sigma = math.sqrt((1 - alpha) * float(1 - ABAR[t - 1]) / (1 - abar))
            x = x + sigma * torch.randn(x.shape, generator=generator)
    return x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--training-steps", type=int, default=4000)
    parser.add_argument("--repeats", type=int, default=20, help="pairs of runs, one serial and one parallel each")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    began = time.perf_counter()
    policy = train(args.training_steps, seed=args.seed)
    print(f"trained {args.training_steps} steps in {time.perf_counter() - began:.0f} s")

    solver = dq.QuasiNewton(nodes=False)  # a call of so small a network costs the same for ten rows as for a hundred
    sampler = dq.DEQSampler(policy, dq.Schedule.ddpm(ABAR, torch.arange(T).flip(0)), solver=solver)
    rows = []
    for k in range(-3, args.repeats):  # the first three warm up
        draw = torch.Generator().manual_seed(args.seed + 1000 + k)
        obs, _ = demonstrations(1, draw)
        noise = torch.randn(1, HORIZON, ACTIONS, generator=draw)
        first = time.perf_counter()
        expected = serial_chain(policy, noise, obs, torch.Generator().manual_seed(k + 10))
        second = time.perf_counter()
        with torch.inference_mode():
            out = sampler.sample(noise, {"obs": obs}, generator=torch.Generator().manual_seed(k + 10))
        third = time.perf_counter()
        error = float((out.sample - expected).norm() / expected.norm())
        if k >= 0:
            rows.append((second - first, third - second, out.stats.rounds, out.stats.model_evals, error))
    serial, parallel, rounds, evals, errors = zip(*rows)
    ratio = statistics.median(a / b for a, b in zip(serial, parallel))
    print(f"medians of {args.repeats} pairs, one action sequence at a time, {torch.get_num_threads()} thread(s)")
    print("          milliseconds   rounds   evaluations   largest error")
    print(f"serial    {1e3 * statistics.median(serial):12.2f}   {T:6d}   {T:11d}")
    print(f"parallel  {1e3 * statistics.median(parallel):12.2f}   {statistics.median(rounds):6.0f}   "
          f"{statistics.median(evals):11.0f}   {max(errors):13.1e}")  # fmt: skip
    print(f"parallel is {ratio:.1f} times as fast")


if __name__ == "__main__":
    main()
