"""Chains that no scheduler makes, each beside the loop that one has already: a flow whose time runs the other way, a
recursion of one's own, and images in [0, 1] that are clamped in every step.

    python examples/own_chains.py
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import deqdiff_fast as dq

POINTS = torch.tensor([[0.2, 0.9, 0.4], [0.8, 0.1, 0.6], [0.5, 0.5, 1.0]])  # the data: three points, a little blurred
VARIANCE = 1e-3
STEPS = 40


def denoised(x: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
    """The exact mean of x0 where x = signal x0 + sigma eps: what a network would be trained to say."""
    signal, sigma = signal[:, None], sigma[:, None]
    total = signal.square() * VARIANCE + sigma.square()
    offset = x[:, None] - signal[..., None] * POINTS
    share = (-offset.square().sum(-1) / (2 * total)).softmax(1)
    return share @ POINTS + signal * VARIANCE / total * (x - signal * (share @ POINTS))


def velocity(x: Tensor, t: Tensor) -> Tensor:
    """A flow from noise at t = 0 to data at t = 1: x = t x0 + (1 - t) eps, velocity x0 - eps."""
    clean = denoised(x, t, 1 - t)
    return (clean - x) / (1 - t)[:, None]


def flow_that_begins_at_0(noise: Tensor) -> tuple[dq.Schedule, Callable[..., Tensor], Tensor]:
    """The library's sigma is the part of noise: 1 - t. Its flow predicts eps - x0, so the velocity changes its sign."""
    times = torch.linspace(0, 1, STEPS + 1)
    x = noise
    for t, after in zip(times[:-1], times[1:]):  # noqa: RUF007
        x = x + (after - t) * velocity(x, t.expand(len(x)))
    schedule = dq.Schedule.from_sigmas(1 - times, flow=True, timesteps=times[:-1])
    return schedule, lambda x, t: -velocity(x, t), x


def adams_bashforth(noise: Tensor) -> tuple[dq.Schedule, Callable[..., Tensor], Tensor]:
    """Any recursion x' = sum_l a_l x_{i-l} + b_l o_{i-l}, here Adams and Bashforth's second order, in its own tables.

    `signal` and `sigma` say how much of a state is data and how much is noise: the solver's guess and slope come from
    them. They may be rough: the fixed point is the recursion's whatever they are.
    """
    times = torch.linspace(0, 1, STEPS + 1)
    x, before = noise, None
    for t, after in zip(times[:-1], times[1:]):  # noqa: RUF007
        now = velocity(x, t.expand(len(x)))
        x = x + (after - t) * (now if before is None else 1.5 * now - 0.5 * before)
        before = now
    length = times.diff()
    state, output = torch.zeros(STEPS, 2), torch.zeros(STEPS, 2)
    state[:, 0], output[:, 0], output[:, 1] = 1, 1.5 * length, -0.5 * length
    output[0] = torch.stack([length[0], torch.zeros(())])  # the first step has nothing before it
    schedule = dq.Schedule(
        timesteps=times[:-1], input_scale=torch.ones(STEPS), state_coef=state, model_coef=-output,
        noise_coef=torch.zeros(STEPS), signal=times, sigma=1 - times, prediction_type="flow", name="Adams-Bashforth",
    )  # fmt: skip
    return schedule, lambda x, t: -velocity(x, t), x


def clamped_to_0_1(noise: Tensor) -> tuple[dq.Schedule, Callable[..., Tensor], Tensor]:
    """`Clip` is for [-1, 1]. Any other clamp of the clean sample goes into a model that predicts it."""
    abar = (1 - torch.linspace(1e-4, 0.02, 1000)).cumprod(0)
    timesteps = torch.arange(0, 1000, 1000 // STEPS).flip(0)

    def clean(x: Tensor, t: Tensor) -> Tensor:
        return denoised(x, abar[t].sqrt(), (1 - abar[t]).sqrt()).clamp(0, 1)

    x = noise
    for i, t in enumerate(timesteps):
        now, after = abar[t], abar[timesteps[i + 1]] if i + 1 < STEPS else torch.ones(())
        x0 = clean(x, t.expand(len(x)))
        x = after.sqrt() * x0 + (1 - after).sqrt() * (x - now.sqrt() * x0) / (1 - now).sqrt()
    return dq.Schedule.ddim(abar, timesteps, prediction_type="sample"), clean, x


@torch.no_grad()
def main() -> None:
    noise = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    for chain in (flow_that_begins_at_0, adams_bashforth, clamped_to_0_1):
        schedule, model, expected = chain(noise)
        out = dq.DEQSampler(model, schedule, solver="quasi-newton").sample(noise)
        error = float(((out.sample - expected).norm(dim=1) / expected.norm(dim=1)).max())
        print(f"{chain.__name__}: {STEPS} steps in {out.stats.rounds} rounds, largest error {error:.1e}")


if __name__ == "__main__":
    main()
