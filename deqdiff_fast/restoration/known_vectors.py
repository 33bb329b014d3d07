"""Coordinates for noisy measurements, in the singular vectors of the operator.

Component j of the measurement is ybar_j = (U^T y)_j / s_j, with noise of standard deviation tau_j = sigma_y / s_j. The
chain passes levels of noise sigma_i / signal_i. While that is at least tau_j, the state's component is the measurement
and the rest of the level's noise,

    K_ij = weight_i ybar_j + r_ij n_ij,    r_ij^2 = 1 - (weight_i tau_j / sigma_i)^2,

with n the noise that the chain has there: no model is asked. Below that level the measurement has nothing to add to
what the state holds, and the model takes over: K_ij = weight_i ybar_j, and the clean sample of u = x - K is x0 - ybar.

This is DDNM+ (Wang, Yu, Zhang 2022, arXiv 2212.00490, section 3.3): scale and noise of the range part for each singular
value, such that a step has the noise of its level. There lambda = min(1, sigma_t / (a_t tau)) for the noise of one
ancestral step; here for all of the level's, so that it holds for deterministic chains too, and the noise is the
chain's own. With `fresh` it is DDRM (Kawar et al. 2022, arXiv 2201.11793, equations 7 and 8): the noise is drawn anew
at every step, and below the level x' = signal' x0 + k (ybar - x0) / tau + noise z, k = carry sigma.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._types import Shared, shared
from ..operators import Operator
from .base import Rows, Start, Task
from .levels import column


@dataclass(frozen=True)
class KnownVectors:
    """See above."""

    fresh: bool = False

    def begin(self, task: Task, noise: Tensor, draws: Tensor | None) -> Start:
        """See `Coordinates.begin`."""
        operator, levels = task.operator, task.levels.to(noise.device, noise.dtype)
        assert task.sigma is not None
        spread, inverse = spread_of(operator, noise, task.sigma)
        measured, c = inverse * operator.U_adjoint(task.y), operator.V_adjoint(noise)
        data: dict[str, Any] = {"measured": measured, "noise": c, "sigma": task.sigma}
        first = is_known(spread, levels.signal[:1], levels.sigma[:1], noise)
        start = operator.V(torch.where(first, torch.zeros_like(c), c - self._weight(levels)[0] * measured))
        if draws is None:
            return Start(start, None, data)
        parts = torch.stack([operator.V_adjoint(draw) for draw in draws])
        if self.fresh:
            scaled = parts * levels.sigma[1:].view(-1, *(1,) * c.dim())
            path = torch.cat([c[None], scaled])
        else:
            path = task.levels.noise_path(task.schedule, c, parts)
        data["noise"] = shared(path)
        if not task.schedule.stochastic:
            return Start(start, None, data)
        known = [
            is_known(spread, levels.signal[i : i + 1], levels.sigma[i : i + 1], noise) for i in range(1, len(path))
        ]
        unknown = [operator.V(torch.where(k, torch.zeros_like(part), part)) for k, part in zip(known, parts)]
        return Start(start, task.frozen(torch.stack(unknown)), data)

    def state(self, u: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """See `Coordinates.state`."""
        operator, levels, step, c = rows.operator, rows.levels, rows.step, rows.operator.V_adjoint(u)
        noise = rows.data["noise"]
        noise = noise[step, rows.sample] if noise.dim() > c.dim() else column(levels.decay[step], c) * noise
        spread, _ = spread_of(operator, u, rows.data["sigma"])
        known = is_known(spread, levels.signal[step], levels.sigma[step], c)
        weight = column(self._weight(levels)[step], c)
        share = (1 - (weight * spread / column(levels.sigma[step], c)).square()).clamp_min(0).sqrt()
        unknown = operator.V(torch.where(known, torch.zeros_like(c), c))
        return operator.V(weight * rows.data["measured"] + torch.where(known, share * noise, c)), unknown

    def clean(self, x0: Tensor, unknown: Tensor, rows: Rows) -> Tensor:
        """See `Coordinates.clean`."""
        operator, levels, step, c = rows.operator, rows.levels, rows.step, rows.operator.V_adjoint(x0)
        spread, inverse = spread_of(operator, x0, rows.data["sigma"])
        known = is_known(spread, levels.signal[step + 1], levels.sigma[step + 1], c)
        left = c - rows.data["measured"]
        if self.fresh:
            left = torch.where(inverse > 0, self._without_memory(left, unknown, spread, rows), c)
        return operator.V(torch.where(known, torch.zeros_like(c), left))

    def finish(self, u: Tensor, task: Task, data: dict[str, Any]) -> Tensor:
        """See `Coordinates.finish`."""
        operator, levels, c = task.operator, task.levels.to(u.device, u.dtype), task.operator.V_adjoint(u)
        spread, _ = spread_of(operator, u, data["sigma"])
        known = is_known(spread, levels.signal[-1:], levels.sigma[-1:], c)
        noise = data["noise"].value[-1] if isinstance(data["noise"], Shared) else levels.decay[-1] * data["noise"]
        weight = self._weight(levels)[-1]
        share = (1 - (weight * spread / levels.sigma[-1].clamp_min(1e-30)).square()).clamp_min(0).sqrt()
        return operator.V(weight * data["measured"] + torch.where(known, share * noise, c))

    def _weight(self, levels: Any) -> Tensor:
        weight: Tensor = levels.signal if self.fresh else levels.weight
        return weight

    def _without_memory(self, left: Tensor, unknown: Tensor, spread: Tensor, rows: Rows) -> Tensor:
        """w such that the next u is (signal' - k / tau) (x0 - ybar), whatever this one is; left: x0 - ybar."""
        carry, clean = rows.level("carry", left), rows.level("clean", left)
        k = carry * rows.level("sigma", left)
        wanted = (rows.level("signal", left, 1) - k / spread) * left - carry * rows.operator.V_adjoint(unknown)
        return torch.where(clean == 0, left, wanted / torch.where(clean == 0, 1, clean))


def spread_of(operator: Operator, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Standard deviation of the noise in each component, infinite where nothing is measured, and 1 / s, 0 there.

    x: images (n, *shape); sigma: (n, 1).
    """
    values = operator.singular_values(x.shape, x.device, x.dtype)
    measured = values > 0
    inverse = torch.where(measured, 1 / torch.where(measured, values, 1), 0)
    inverse = inverse.expand(len(x), *inverse.shape[-(x.dim() - 1) :]) if inverse.dim() < x.dim() else inverse
    noise = sigma.to(x).view(-1, *(1,) * (inverse.dim() - 1)) * inverse
    return torch.where(inverse > 0, noise, torch.inf), inverse


def is_known(spread: Tensor, signal: Tensor, sigma: Tensor, like: Tensor) -> Tensor:
    """Which components the measurement decides at levels (n,) of noise."""
    return (column(signal, like) * spread <= column(sigma, like)) & spread.isfinite()
