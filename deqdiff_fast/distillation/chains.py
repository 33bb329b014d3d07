"""Deterministic chains through some of a schedule's noise levels: where a solve's states lie."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..schedule import Clip, Schedule
from ..schedule.tables import absorb

STEPS, GRADE = 32, 1.4  # of a chain; how much denser they are towards the sample


def draw_grids(steps: int, count: int, generator: torch.Generator) -> Tensor:
    """(S, count) increasing indices of a schedule's timesteps for `count` chains, the first 0: each its own, so that
    all timesteps are met, and denser towards the sample."""
    if steps <= STEPS + STEPS // 2:
        return torch.arange(steps)[:, None].expand(steps, count)
    inner = torch.arange(1, STEPS + 1, dtype=torch.float64)[:, None]
    u = (inner - torch.rand(STEPS, count, generator=generator, dtype=torch.float64)) / STEPS
    index = (steps * (1 - (1 - u).pow(GRADE))).long().clamp(1, steps - 1)
    floor = torch.arange(1, STEPS + 1)[:, None]  # at least one timestep further at each step
    index = ((index - floor).cummax(0).values + floor).minimum(steps - STEPS - 1 + floor)
    return torch.cat([torch.zeros(1, count, dtype=torch.int64), index])


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
    at = torch.arange(steps) * total // steps
    ends = torch.cat([at, torch.tensor([total])])
    signal, sigma = schedule.signal[ends], schedule.sigma[ends]
    ratio = sigma[1:] / sigma[:-1]
    clean = signal[1:] - signal[:-1] * ratio
    state_coef, model_coef = absorb(ratio, clean[:, None], schedule.denoised_coef()[at])
    clip = None if schedule.clip is None else Clip(schedule.clip.range, schedule.clip.gain[at])
    return Schedule(
        schedule.timesteps[at], schedule.input_scale[at], state_coef, model_coef, torch.zeros_like(ratio), signal,
        sigma, schedule.prediction_type, clip, f"{schedule.name}, thinned", schedule.init_noise_sigma,
        None if schedule.x0_coef is None else schedule.x0_coef[at],
    )  # fmt: skip
