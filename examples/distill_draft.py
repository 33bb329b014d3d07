"""Distil a draft for a diffusion model: a small network that says roughly what the model says, for fewer rounds.

    python examples/distill_draft.py MODEL --out draft.safetensors --minutes 12

MODEL is "bundled", or a diffusers folder or hub name of an unconditional model with a DDPM noise schedule. No data is
needed: the network is fitted to the model's own predictions. They are asked for along serial DDIM chains, and along
the chains that the draft itself makes of the same noises, stage after stage, since that is where a solve will begin
(dataset aggregation, Ross, Gordon and Bagnell 2011). The loss also holds the *difference* of the predictions at the two
states of a timestep: the draft stands in for the model's Jacobian.

    sampler = DEQSampler(model, schedule, draft=ConvDraft.load("draft.safetensors"))

A file called draft.safetensors in the folder of a model is found by `load_model`, as is spectrum.safetensors.
Needs: torch, diffusers (`pip install deqdiff_fast[diffusers]`).
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import deqdiff_fast as dq
from deqdiff_fast.integrations.diffusers import load_model

STEPS, ROWS = 50, 128  # of the chains; most rows in one call
JACOBIAN = 0.3  # weight of the differences


class Chains:
    """DDIM chains with all offsets of their timesteps, so that every timestep of training is met."""

    def __init__(self, model: torch.nn.Module, scheduler: Any, shape: tuple[int, ...], each: int, seed: int) -> None:
        alphas = scheduler.alphas_cumprod
        self.model, self.spacing = model, len(alphas) // STEPS
        starts = torch.arange(STEPS).flip(0) * self.spacing
        kind = scheduler.config.prediction_type
        self.schedules = [
            dq.Schedule.ddim(alphas, starts + offset, prediction_type=kind) for offset in range(self.spacing)
        ]
        self.clock = torch.stack([starts + offset for offset in range(self.spacing)])  # (offsets, T)
        draw = torch.Generator().manual_seed(seed)
        self.noise = torch.randn(self.spacing, each, *shape, generator=draw).to(next(model.parameters()).device)

    def walk(self, model: Any) -> list[Tensor]:
        """(offsets, T, n, *shape), twice: where the serial chains of that model go, and what it says there."""
        made, said = [], []

        def heard(x: Tensor, t: Tensor) -> Tensor:
            output = model(x, t)
            said.append(output if isinstance(output, Tensor) else output.sample)
            return said[-1]

        for schedule, noise in zip(self.schedules, self.noise):
            chain = dq.DEQSampler(heard, schedule).serial(noise, return_trajectory=True)
            assert chain.trajectory is not None
            made.append(chain.trajectory[:-1])
        states = torch.stack(made)
        return [states, torch.stack(said).view_as(states)]

    def asked(self, states: Tensor) -> Tensor:
        """What the model says at those states."""
        clock = self.clock[:, :, None].expand(states.shape[:3]).flatten().to(states.device)
        rows = zip(states.flatten(0, 2).split(ROWS), clock.split(ROWS))
        said = [self.model(x, t) for x, t in rows]
        return torch.cat([getattr(y, "sample", y) for y in said]).view_as(states)


def fit(
    draft: dq.ConvDraft, clock: Tensor, real: list[Tensor], met: list[list[Tensor]], seconds: float, args: Any
) -> float:
    """Fit the draft to predictions at pairs of states of the same timestep; returns the mean loss of the last steps.

    real: states on the model's chains, and its predictions there; met: the same on each draft's chains.
    """
    optimizer = torch.optim.AdamW(draft.parameters(), lr=args.lr, weight_decay=1e-3)
    offsets, steps, samples = real[0].shape[:3]
    start, losses, done = time.perf_counter(), [], 0.0
    while done < 1:
        rate = min(1.0, len(losses) / 100) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))
        optimizer.param_groups[0]["lr"] = rate * args.lr
        o, b = torch.randint(offsets, (args.batch,)), torch.randint(samples, (args.batch,))
        i = (steps * (1 - torch.rand(args.batch) ** 1.5)).long().clamp_max(steps - 1)  # more of the end of the chain
        other = met[int(torch.randint(len(met), ()))]
        x, e, y, f = (values[o, i, b] for values in (*real, *other))
        t = clock[o, i].to(x.device)
        at_x, at_y = draft(torch.cat([x, y]), torch.cat([t, t])).chunk(2)
        apart = (e - f).square().flatten(1).mean(1)
        wrong = (at_x - at_y - e + f).square().flatten(1).mean(1)
        loss = (at_x - e).square().mean() + (at_y - f).square().mean() + JACOBIAN * (wrong / (apart + 1e-3)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        done = (time.perf_counter() - start) / seconds
        if len(losses) % 500 == 0:
            print(f"  step {len(losses)}, loss {sum(losses[-200:]) / 200:.4f}", flush=True)
    return sum(losses[-200:]) / len(losses[-200:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, default=Path("draft.safetensors"))
    parser.add_argument("--minutes", type=float, default=12.0, help="of fitting, all stages together")
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--each", type=int, default=16, help="chains for each offset of the timesteps")
    parser.add_argument("--width", type=int, default=48)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--batch", type=int, default=24, help="pairs of states in a step of the optimizer")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    model, scheduler, info, spectrum = load_model(args.model, device=args.device)[:4]
    chains = Chains(model, scheduler, info.sample_shape, args.each, args.seed + 10**6)
    with torch.no_grad():
        print("the model's own chains ...", flush=True)
        real = chains.walk(model)
    spectrum = spectrum or dq.SpectralSlope.fit(real[0][:, -1].flatten(0, 1))
    draft = dq.ConvDraft(scheduler.alphas_cumprod, scheduler.config.prediction_type, spectrum, args.width, args.depth)
    draft = draft.to(args.device, memory_format=torch.channels_last)
    met: list[list[Tensor]] = []
    for stage in range(1, args.stages + 1):
        with torch.no_grad():
            print(f"stage {stage}: the chains of the draft ...", flush=True)
            trail = chains.walk(draft.eval())[0]
            met.append([trail, chains.asked(trail)])
        loss = fit(draft.train(), chains.clock, real, met, 60 * args.minutes / args.stages, args)
        print(f"stage {stage}: loss {loss:.4f}", flush=True)
        draft.save(args.out)
    print(f"wrote {args.out}: {sum(p.numel() for p in draft.parameters())} parameters")


if __name__ == "__main__":
    main()
