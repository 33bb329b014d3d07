"""Chains of other kinds than plain DDIM, by name, each with the number of steps that it is usually run with.

The schedules are those of diffusers' own schedulers, read out of their `step()`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import deqdiff_fast as dq

from . import _policy
from ._problems import ABAR, TRAIN_STEPS, Mixture, Problem

LATENT = (4, 64, 64)


class Flow:
    """A variance-preserving v-model as the velocity of a flow, eps - x0 at x = (1 - s) x0 + s eps: by the exact change
    of variables, without training.

    Scaled to unit variance, x / |(1 - s, s)|, the state is one of the model's own chain, at the timestep with the same
    ratio of noise to signal, s / (1 - s) = sigma / alpha, which is looked up between the trained ones (linear in the
    log of that ratio). Its v gives x0 = alpha x - sigma v and eps = sigma x + alpha v. Where s is noisier than the last
    trained timestep, that one is used, with the alpha and sigma of s. At trained timesteps the velocity is the model's
    own; between them the model is asked at a fraction of a timestep.
    """

    def __init__(self, model: Callable[..., Any], abar: Tensor = ABAR) -> None:
        self.model = model
        self.ratio = ((1 - abar) / abar).sqrt().log()  # (N,) rising

    def timestep(self, s: Tensor) -> Tensor:
        """(n,) float64 timesteps of the flow times s: (n,) in (0, 1]."""
        wanted = (s.double() / (1 - s.double())).log().clamp(self.ratio[0], self.ratio[-1])
        right = torch.searchsorted(self.ratio, wanted.cpu()).clamp(1, len(self.ratio) - 1)
        low, high = self.ratio[right - 1], self.ratio[right]
        return right - 1 + (wanted.cpu() - low) / (high - low)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """x: (n, *shape); t: (n,) = 1000 s."""
        s = (t / 1000).view(-1, *[1] * (x.dim() - 1)).to(x.dtype)
        size = torch.hypot(1 - s, s)
        alpha, sigma, scaled = (1 - s) / size, s / size, x / size
        out = self.model(scaled, self.timestep(t / 1000).to(x.device, x.dtype))
        v: Tensor = getattr(out, "sample", out)
        return (sigma * scaled + alpha * v) - (alpha * scaled - sigma * v)


class Named(NamedTuple):
    """A problem and how it is usually run."""

    build: Callable[[argparse.Namespace], Problem]
    steps: int
    eta: float
    what: str


def _fixed(make: Callable[[int], dq.Schedule], name: str) -> Callable[[int, float], dq.Schedule]:
    """A schedule without an eta."""

    def schedule(steps: int, eta: float) -> dq.Schedule:
        if eta:
            raise ValueError(f"--eta: expected 0 for --problem {name}, which has no eta, got {eta:g}")
        return make(steps)

    return schedule


def _bundled(name: str, args: argparse.Namespace) -> Problem:
    """The bundled model under another sampler."""
    import diffusers

    from deqdiff_fast.integrations.diffusers import load_model

    loaded = load_model("bundled", device=args.device)
    scheduler = {
        "ddpm": lambda: diffusers.DDPMScheduler.from_config(loaded.scheduler.config),
        "dpmpp": lambda: diffusers.DPMSolverMultistepScheduler.from_config(
            loaded.scheduler.config, algorithm_type="dpmsolver++", solver_order=2
        ),
        "flow": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    }[name]()
    model, draft = (net if net is None or name != "flow" else Flow(net) for net in (loaded.model, loaded.draft))
    schedule = _fixed(lambda steps: dq.Schedule.from_diffusers(scheduler, steps), name)
    return Problem(name, model, schedule, loaded.info.sample_shape, args.device, loaded.spectrum, draft)


def _latent(args: argparse.Namespace) -> Problem:
    def schedule(steps: int, eta: float) -> dq.Schedule:
        return dq.Schedule.ddim(ABAR, torch.arange(steps).flip(0) * (TRAIN_STEPS // steps), eta=eta)

    return Problem("latent", Mixture(LATENT), schedule, LATENT, args.device)


CHAINS = {
    "ddpm": Named(lambda args: _bundled("ddpm", args), 1000, 0.0, "bundled model, DDPM (ancestral)"),
    "dpmpp": Named(lambda args: _bundled("dpmpp", args), 20, 0.0, "bundled model, DPM-Solver++(2M)"),
    "flow": Named(lambda args: _bundled("flow", args), 28, 0.0, "bundled model as a flow, Euler, shift 3"),
    "latent": Named(_latent, 50, 0.0, "Gaussian mixture of the size of a latent, 4 x 64 x 64, DDIM"),
    "policy": Named(lambda args: _policy.problem(args.device), 100, 1.0, "small diffusion policy, DDPM (DDIM, eta 1)"),
}
