"""Deterministic chains through some of a schedule's noise levels: where a solve's states lie."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..schedule import Clip, Schedule
from ..schedule.tables import absorb

STEPS, GRADE = 32, 1.4  # of a chain; how much denser they are towards the sample
MOST_GROWTH = 2.0  # of an error of a prediction in a step


def first_step(schedule: Schedule, steps: int) -> int:
    """The first timestep at which a chain of about `steps` of a schedule's may begin: where an error of the prediction
    does not grow in a step. At a vanishing signal, as many schedules begin, predicted noise is divided by it."""
    stride = max(schedule.num_steps // steps, 1)
    if stride == 1:
        return 0
    now = torch.arange(schedule.num_steps - stride)
    signal, sigma, then = schedule.signal, schedule.sigma, now + stride
    clean = signal[then] - signal[now] * sigma[then] / sigma[now].clamp_min(1e-12)
    growth = (clean * schedule.denoised_coef()[now, 1]).abs() / torch.hypot(signal[then], sigma[then])
    return int((growth <= MOST_GROWTH).int().argmax())


def start_size(schedule: Schedule, first: int) -> float:
    """Standard deviation of the state that is all noise at that timestep."""
    size = torch.hypot(schedule.signal, schedule.sigma)
    return schedule.init_noise_sigma * float(size[first] / size[0])


def draw_grids(schedule: Schedule, count: int, generator: torch.Generator) -> Tensor:
    """(S, count) increasing indices of a schedule's timesteps for `count` chains, the first one the same: each its own,
    so that all timesteps are met, and denser towards the sample."""
    total, first = schedule.num_steps, first_step(schedule, STEPS)
    if total <= STEPS + STEPS // 2:
        return torch.arange(total)[:, None].expand(total, count)
    inner = torch.arange(1, STEPS + 1, dtype=torch.float64)[:, None]
    u = (inner - torch.rand(STEPS, count, generator=generator, dtype=torch.float64)) / STEPS
    index = first + ((total - first) * (1 - (1 - u).pow(GRADE))).long()
    order = torch.arange(1, STEPS + 1)[:, None]  # at least one timestep further at each step
    index = ((index - order).clamp_min(first).cummax(0).values + order).minimum(total - STEPS - 1 + order)
    return torch.cat([torch.full((1, count), first), index])


def walk(
    schedule: Schedule,
    predict: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    noise: Tensor,
    grid: Tensor,
    before_step: Callable[[], object] = lambda: None,
) -> tuple[Tensor, Tensor, Tensor]:
    """DDIM (Song et al. 2020, arXiv 2010.02502, equation 12) from noise: (n, D) through the levels of grid: (S, n).

    Args:
        predict: (states (n, D), step (n,)) -> what is said there, and what of it the chain follows, (n, D) each.
        before_step: called before every step.

    Returns:
        States (S, n, D), what was said there (S, n, D), and the samples (n, D).
    """
    device, dtype = noise.device, noise.dtype
    signal, sigma = (table.to(device) for table in (schedule.signal, schedule.sigma))
    p, q = schedule.denoised_coef().to(device).unbind(1)
    after = torch.cat([grid[1:], grid.new_full((1, grid.shape[1]), schedule.num_steps)]).to(device)
    x, states, outputs = noise, [], []
    for now, then in zip(grid.to(device), after):
        before_step()
        said, followed = predict(x, now)
        states.append(x)
        outputs.append(said)
        ratio = sigma[then] / sigma[now].clamp_min(1e-12)
        clean = signal[then] - signal[now] * ratio
        x = x * (ratio + clean * p[now])[:, None].to(dtype) + followed * (clean * q[now])[:, None].to(dtype)
    return torch.stack(states), torch.stack(outputs), x


def thinned(schedule: Schedule, steps: int) -> Schedule:
    """A deterministic chain through `steps` of a schedule's noise levels, evenly chosen; itself where it has no more
    timesteps."""
    total = schedule.num_steps
    if total <= steps:
        return schedule
    first = first_step(schedule, steps)
    at = first + torch.arange(steps) * (total - first) // steps
    ends = torch.cat([at, torch.tensor([total])])
    signal, sigma = schedule.signal[ends], schedule.sigma[ends]
    ratio = sigma[1:] / sigma[:-1]
    clean = signal[1:] - signal[:-1] * ratio
    state_coef, model_coef = absorb(ratio, clean[:, None], schedule.denoised_coef()[at])
    clip = None if schedule.clip is None else Clip(schedule.clip.range, schedule.clip.gain[at])
    return Schedule(
        schedule.timesteps[at], schedule.input_scale[at], state_coef, model_coef, torch.zeros_like(ratio), signal,
        sigma, schedule.prediction_type, clip, f"{schedule.name}, thinned", start_size(schedule, first),
        None if schedule.x0_coef is None else schedule.x0_coef[at],
    )  # fmt: skip
