"""Random chains, each with its schedule and with a plain loop of its own, written from the papers' formulas.

Nothing of the package's tables is read here: the loop is what a schedule must agree with.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

import deqdiff_fast as dq
from deqdiff_fast.schedule.clip import Clip

STEPS = (1, 2, 3, 5, 8, 10, 12, 16, 20, 25, 32, 40, 50, 50, 64, 100, 100, 150)
LONG = (300, 1000)
KINDS = ("ddim", "ddim", "ddim-eta", "ddpm", "clipped", "euler", "dpmpp_2m", "flow", "own")

Call = Callable[..., Tensor]
"""A model on states (B, *shape), all at one time, multiplied by a scale if one is given; its arguments are bound."""
Keep = Callable[[Tensor], Tensor]
"""What becomes of a new state before it is used: nothing, or what rounding might do to it."""


@dataclass
class Chain:
    """One sampler: the library's schedule, and what a loop over it does."""

    kind: str
    schedule: dq.Schedule
    prediction: str
    levels: Callable[[Tensor], tuple[Tensor, Tensor]]
    """t: (n,) -> signal and noise, (n,), of what the model is given at that time."""
    loop: Callable[[Call, Tensor, Callable[[], Tensor], Keep], Tensor]
    """(model, x_0, a draw of normal noise, what is kept of a state) -> x_T, in the dtype of x_0."""
    start: float = 1.0
    """Standard deviation of x_0."""


def alphas(draw: random.Random) -> Tensor:
    """Cumulative alphas of one of the usual thousand-step schedules, or of another length."""
    count = draw.choice((1000, 1000, 1000, 400))
    kind = draw.choice(("linear", "cosine", "scaled"))
    if kind == "cosine":
        at = torch.arange(count + 1, dtype=torch.float64) / count
        curve = ((at + 0.008) / 1.008 * math.pi / 2).cos().square()
        betas = (1 - curve[1:] / curve[:-1]).clamp(max=0.999)
    elif kind == "linear":
        betas = torch.linspace(1e-4, 0.02, count, dtype=torch.float64) * 1000 / count
    else:
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, count, dtype=torch.float64).square() * 1000 / count
    return (1 - betas).cumprod(0)


def visited(draw: random.Random, count: int, steps: int) -> Tensor:
    """(T,) descending timesteps."""
    steps, spacing = min(steps, count), draw.choice(("leading", "linspace", "trailing", "any"))
    if spacing == "leading":
        return torch.arange(steps).flip(0) * (count // steps)
    if spacing == "linspace":
        return torch.linspace(0, count - 1, steps, dtype=torch.float64).round().long().flip(0)
    if spacing == "trailing":
        return (count - torch.arange(steps, dtype=torch.float64) * count / steps).round().long() - 1
    return torch.tensor(sorted(draw.sample(range(count), steps), reverse=True))


def clean_and_noise(x: Tensor, out: Tensor, signal: float, sigma: float, prediction: str) -> tuple[Tensor, Tensor]:
    """What an output says of x = signal x0 + sigma eps."""
    if prediction == "epsilon":
        return (x - sigma * out) / signal, out
    if prediction == "sample":
        return out, (x - signal * out) / sigma
    if prediction == "v_prediction":
        size = math.hypot(signal, sigma)
        clean = (signal * x / size - sigma * out) / size
        return clean, (x - signal * clean) / sigma
    clean = (x - sigma * out) / (signal + sigma)  # out = eps - x0
    return clean, clean + out


def diffusion(draw: random.Random, kind: str, steps: int) -> Chain:
    """DDIM with or without noise, DDPM, and DDIM whose clean sample is clamped."""
    abar = alphas(draw)
    times = visited(draw, len(abar), steps)
    prediction = draw.choice(("epsilon", "v_prediction", "sample"))
    last = draw.choice((1.0, 1.0, float(abar[0])))
    last = 1.0 if kind == "clipped" else last  # a step that does nothing but clip is none of `Clip`'s
    eta = {"ddim-eta": draw.choice((0.1, 0.5, 1.0)), "clipped": draw.choice((0.0, 0.0, 0.7))}.get(kind, 0.0)
    limit = draw.choice((1.0, 2.5)) if kind == "clipped" else math.inf
    now = [float(abar[t]) for t in times]
    after = [*now[1:], last]
    pairs = list(zip(times.tolist(), now, after))

    def loop(model: Call, x: Tensor, normal: Callable[[], Tensor], keep: Keep) -> Tensor:
        for t, a, b in pairs:
            clean, eps = clean_and_noise(x, model(x, t), math.sqrt(a), math.sqrt(1 - a), prediction)
            clean = clean.clamp(-limit, limit)
            if kind == "ddpm":
                beta = 1 - a / b
                x = math.sqrt(b) * beta / (1 - a) * clean + math.sqrt(a / b) * (1 - b) / (1 - a) * x
                added = math.sqrt(beta * (1 - b) / (1 - a))
            else:
                added = eta * math.sqrt(max((1 - b) / (1 - a) * (1 - a / b), 0))
                x = math.sqrt(b) * clean + math.sqrt(max(1 - b - added**2, 0)) * eps
            x = keep(x + added * normal() if added else x)
        return x

    if kind == "ddpm":
        schedule = dq.Schedule.ddpm(abar, times, last, prediction)
    else:
        schedule = dq.Schedule.ddim(abar, times, eta, last, prediction)
    if kind == "clipped":
        # o + gain (clamp(x0) - x0) must move the next state by sqrt(b) (clamp(x0) - x0)
        gain = torch.tensor(after, dtype=torch.float64).sqrt() / schedule.model_coef[:, 0]
        schedule = replace(schedule, clip=Clip(limit, gain))
    return Chain(kind, schedule, prediction, lambda t: (abar[t.cpu()].sqrt(), (1 - abar[t.cpu()]).sqrt()), loop)


def noise_levels(draw: random.Random, steps: int, low: float, high: float) -> Tensor:
    """(T + 1,) noise levels after Karras et al., down to 0 or not."""
    ramp, rho = torch.linspace(0, 1, steps, dtype=torch.float64), draw.choice((1.0, 3.0, 7.0))
    sigmas = (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    return torch.cat([sigmas, torch.tensor([draw.choice((0.0, 0.0, low / 2))], dtype=torch.float64)])


def denoising(draw: random.Random, kind: str, steps: int) -> Chain:
    """Euler's method and DPM-Solver++(2M) over noise levels, x = x0 + sigma eps."""
    sigmas = noise_levels(draw, steps, draw.choice((0.002, 0.03)), draw.choice((14.6, 80.0)))
    prediction, levels = draw.choice(("sample", "sample", "epsilon", "v_prediction")), sigmas.tolist()
    scaled = prediction != "sample"

    def loop(model: Call, x: Tensor, normal: Callable[[], Tensor], keep: Keep) -> Tensor:
        before: Tensor | None = None
        for i, (sigma, to) in enumerate(pairwise(levels)):
            out = model(x, sigma, 1 / math.sqrt(sigma**2 + 1)) if scaled else model(x, sigma)
            clean, eps = clean_and_noise(x, out, 1.0, sigma, prediction)
            if kind == "euler":
                x = keep(x + (to - sigma) * eps)
            else:
                mixed = clean
                if before is not None and to > 0:
                    ratio = math.log(sigma / to) / math.log(levels[i - 1] / sigma) / 2  # h / (2 h of the step before)
                    mixed = (1 + ratio) * clean - ratio * before
                x, before = keep(to / sigma * x + (1 - to / sigma) * mixed), clean
        return x

    schedule = dq.Schedule.from_sigmas(sigmas, kind, prediction_type=prediction)

    def seen(t: Tensor) -> tuple[Tensor, Tensor]:
        size = (t.double().square() + 1).sqrt() if scaled else torch.ones(len(t), dtype=torch.float64)
        return 1 / size, t.double() / size

    return Chain(kind, schedule, prediction, seen, loop, levels[0])


def flow(draw: random.Random, kind: str, steps: int) -> Chain:
    """Euler's method on a rectified flow, x = (1 - sigma) x0 + sigma eps."""
    shift = draw.choice((1.0, 3.0))
    plain = torch.linspace(draw.choice((1.0, 0.99)), 0, steps + 1, dtype=torch.float64)
    levels = (shift * plain / (1 + (shift - 1) * plain)).tolist()
    schedule = dq.Schedule.from_sigmas(levels, flow=True)

    def loop(model: Call, x: Tensor, normal: Callable[[], Tensor], keep: Keep) -> Tensor:
        for sigma, to in pairwise(levels):
            x = keep(x + (to - sigma) * model(x, 1000 * sigma))
        return x

    return Chain(kind, schedule, "flow", lambda t: (1 - t.double() / 1000, t.double() / 1000), loop)


def own(draw: random.Random, kind: str, steps: int) -> Chain:
    """A recursion that is nobody's sampler, with one to three lags: x' = a x + sum_l b_l o_l, noise or none."""
    lags, noisy = draw.randint(1, min(3, steps)), draw.random() < 0.3
    state, output = torch.zeros(steps, lags, dtype=torch.float64), torch.zeros(steps, lags, dtype=torch.float64)
    for i in range(steps):
        state[i, 0] = draw.uniform(0.97, 1.01)
        for lag in range(min(lags, i + 1)):
            output[i, lag] = draw.uniform(-0.5, 1.5) * (-0.5) ** lag / steps
    added = [draw.uniform(0, 0.3) / math.sqrt(steps) if noisy else 0.0 for _ in range(steps)]
    sigma = torch.linspace(1, 0.05, steps + 1, dtype=torch.float64)
    signal = (1 - sigma.square()).sqrt()
    times = torch.linspace(1, 1 / steps, steps, dtype=torch.float64)
    schedule = dq.Schedule(
        timesteps=times, input_scale=torch.ones(steps), state_coef=state, model_coef=output,
        noise_coef=torch.tensor(added, dtype=torch.float64), signal=signal, sigma=sigma, prediction_type="sample",
    )  # fmt: skip
    table = [(float(times[i]), float(state[i, 0]), output[i].tolist(), added[i]) for i in range(steps)]

    def loop(model: Call, x: Tensor, normal: Callable[[], Tensor], keep: Keep) -> Tensor:
        outs: list[Tensor] = []
        for t, a, b, scale in table:
            outs.insert(0, model(x, t))
            x = a * x + sum(weight * out for weight, out in zip(b, outs))
            x = keep(x + scale * normal() if scale else x)
        return x

    def levels(t: Tensor) -> tuple[Tensor, Tensor]:
        noise = 0.05 + 0.95 * t.double().clamp(0, 1)
        return (1 - noise.square()).sqrt(), noise

    return Chain(kind, schedule, "sample", levels, loop)


def random_chain(draw: random.Random) -> Chain:
    """Any of them."""
    kind, steps = draw.choice(KINDS), draw.choice(STEPS) if draw.random() < 0.97 else draw.choice(LONG)
    makers = {"euler": denoising, "dpmpp_2m": denoising, "flow": flow, "own": own}
    return makers.get(kind, diffusion)(draw, kind, steps)
