"""A schedule's numbers as restoration wants them: steps written in terms of the state and the clean sample."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..schedule import Schedule


@dataclass(frozen=True, eq=False)
class Levels:
    """One-step schedules read x' = carry x + clean x0 + noise z; in all, x = signal x0 + sigma eps and x0 = p x + q o.

    Attributes:
        signal, sigma: (T + 1,).
        p, q, carry, clean, noise: (T,).
        weight: (T + 1,), what a clean sample that is known from the start has in the state.
        decay: (T + 1,), what is left there of the noise that the chain began with.
        kept: (T + 1,), standard deviation of the noise that the state has of the one before, 0 at the first.
    """

    signal: Tensor
    sigma: Tensor
    p: Tensor
    q: Tensor
    carry: Tensor
    clean: Tensor
    noise: Tensor
    weight: Tensor
    decay: Tensor
    kept: Tensor

    @classmethod
    def of(cls, schedule: Schedule) -> Levels:
        """Float64, on the CPU. Raises ValueError where the model's output does not enter the clean sample."""
        p, q = schedule.denoised_coef().unbind(1)
        if bool((q == 0).any()):
            raise ValueError(
                f"schedule: expected a clean sample that depends on the prediction at every step, got none at step "
                f"{int((q == 0).nonzero()[0])}"
            )
        clean = schedule.model_coef[:, 0] / q
        carry = schedule.state_coef[:, 0] - clean * p
        weight, decay = torch.zeros_like(schedule.sigma), torch.zeros_like(schedule.sigma)
        decay[0] = 1
        for i, lags in chain_lags(schedule):
            for lag in lags:
                of_state = schedule.state_coef[i, lag] - schedule.model_coef[i, lag] * p[i - lag] / q[i - lag]
                of_clean = schedule.model_coef[i, lag] / q[i - lag]
                weight[i + 1] += of_state * weight[i - lag] + of_clean
                decay[i + 1] += of_state * decay[i - lag]
        kept = torch.cat([torch.zeros_like(carry[:1]), carry * schedule.sigma[:-1]])
        return cls(schedule.signal, schedule.sigma, p, q, carry, clean, schedule.noise_coef, weight, decay, kept)

    def to(self, device: torch.device, dtype: torch.dtype) -> Levels:
        """The same tables elsewhere."""
        return Levels(**{field.name: getattr(self, field.name).to(device, dtype) for field in fields(self)})

    def noise_path(self, schedule: Schedule, start: Tensor, draws: Tensor) -> Tensor:
        """(T + 1, B, ...): the noise in states whose clean sample is known. start: (B, ...); draws: (T, B, ...)."""
        path = [start]
        for i, lags in chain_lags(schedule):
            new = float(self.noise[i]) * draws[i]
            for lag in lags:
                gain = schedule.state_coef[i, lag] - schedule.model_coef[i, lag] * self.p[i - lag] / self.q[i - lag]
                new = new + float(gain) * path[i - lag]
            path.append(new)
        return torch.stack(path)


def chain_lags(schedule: Schedule) -> list[tuple[int, range]]:
    """(i, lags that there are) of every step."""
    return [(i, range(min(schedule.lags, i + 1))) for i in range(schedule.num_steps)]


def column(values: Tensor, like: Tensor) -> Tensor:
    """(n,) values, to be broadcast to (n, ...)."""
    return values.view(-1, *(1,) * (like.dim() - 1))
