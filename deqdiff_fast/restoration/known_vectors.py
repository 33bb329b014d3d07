"""Coordinates for noisy measurements, in the singular vectors of the operator.

Component j of the measurement is ybar_j = (U^T y)_j / s_j, with noise of standard deviation tau_j = sigma_y / s_j. The
chain passes levels of noise sigma_i / signal_i. While that is at least tau_j, the state's component is the measurement
and the rest of the level's noise,

    K_ij = weight_i ybar_j + r_ij n_ij,    r_ij^2 = 1 - (weight_i tau_j / sigma_i)^2,

with n the noise that the chain has there: no model is asked. Below that level the measurement has nothing to add to
what the state holds, and the model takes over. What it is known to hold still is taken out of the unknowns: with
m_j = ybar_j / (1 + tau_j^2), the best guess for data of unit variance, K' = carry K + clean m, so that the clean sample
of u = x - K is x0 - m.

This is DDNM+ (Wang, Yu, Zhang 2022, arXiv 2212.00490, section 3.3): scale and noise of the range part for each singular
value, such that a step has the noise of its level. There lambda = min(1, sigma_t / (a_t tau)) for the noise of one
ancestral step; here for all of the level's, so that it holds for deterministic chains too, and the noise is the
chain's own. With `fresh` it is DDRM (Kawar et al. 2022, arXiv 2201.11793, equations 7 and 8): the noise is drawn anew
at every step, and below the level x' = signal' x0 + k (ybar - x0) / tau + noise z, k = carry sigma, of which
K' = signal' m + k (ybar - m) / tau is known.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .._types import Shared, shared
from ..operators import Operator
from ..operators.base import invert
from .base import Rows, Start, Task
from .levels import Levels, column


@dataclass(frozen=True)
class KnownVectors:
    """See above."""

    fresh: bool = False

    def begin(self, task: Task, noise: Tensor, draws: Tensor | None) -> Start:
        """See `Coordinates.begin`."""
        operator, levels, c = task.operator, task.levels.to(noise.device, noise.dtype), task.operator.V_adjoint(noise)
        assert task.sigma is not None
        deviation, _ = deviation_of(operator, noise.shape, c, task.sigma)
        parts = None if draws is None else torch.stack([operator.V_adjoint(draw) for draw in draws])
        known = [
            is_known(deviation, signal, sigma, c)
            for signal, sigma in zip(levels.signal[:, None], levels.sigma[:, None])
        ]
        measured, path = self._parts(task, noise, parts)
        data: dict[str, Any] = {"measured": measured, "noise": path if parts is None else shared(path)}
        data["sigma"] = task.sigma
        if not self.fresh:
            data["left"] = _left(task.levels, known, deviation, measured, path)
        first = self._weight(levels)[0] * guess_of(measured, deviation)
        start = operator.V(torch.where(known[0], torch.zeros_like(c), c - first))
        if parts is None or not task.schedule.stochastic:
            return Start(start, None, data)
        unknown = [operator.V(torch.where(k, torch.zeros_like(part), part)) for k, part in zip(known[1:], parts)]
        return Start(start, task.frozen(torch.stack(unknown)), data)

    def _parts(self, task: Task, noise: Tensor, parts: Tensor | None) -> tuple[Tensor, Tensor]:
        """ybar (B, ...), and the noise: (B, ...) at the start, or (T + 1, B, ...) with `parts`, the steps' own."""
        c = task.operator.V_adjoint(noise)
        inverse = invert(task.operator.singular_values(noise.shape, c.device, c.dtype))
        path = c
        if parts is not None and self.fresh:
            scale = task.levels.sigma[1:].to(c)
            path = torch.cat([c[None], parts * scale.view(-1, *(1,) * c.dim())])
        elif parts is not None:
            path = task.levels.noise_path(task.schedule, c, parts)
        return inverse * task.operator.U_adjoint(task.y), path

    def state(self, u: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """See `Coordinates.state`."""
        c, noise = rows.operator.V_adjoint(u), rows.data["noise"]
        if noise.dim() > c.dim():
            noise = noise[rows.step, rows.sample]
        else:
            noise = rows.level("decay", c) * noise
        deviation, _ = deviation_of(rows.operator, u.shape, c, rows.data["sigma"])
        known = is_known(deviation, rows.levels.signal[rows.step], rows.levels.sigma[rows.step], c)
        unknown = torch.where(known, torch.zeros_like(c), c)
        x = unknown + self._known(rows.levels, rows.step, deviation, known, noise, rows.data)
        return rows.operator.V(x), rows.operator.V(unknown)

    def clean(self, x0: Tensor, unknown: Tensor, rows: Rows) -> Tensor:
        """See `Coordinates.clean`."""
        operator, levels, step, c = rows.operator, rows.levels, rows.step, rows.operator.V_adjoint(x0)
        deviation, inverse = deviation_of(operator, x0.shape, c, rows.data["sigma"])
        known = is_known(deviation, levels.signal[step + 1], levels.sigma[step + 1], c)
        left = c - guess_of(rows.data["measured"], deviation)
        if self.fresh:
            unknown = operator.V_adjoint(unknown)
            left = torch.where(inverse > 0, self._without_memory(left, unknown, deviation, rows), left)
        return operator.V(torch.where(known, torch.zeros_like(c), left))

    def finish(self, u: Tensor, task: Task, data: dict[str, Any]) -> Tensor:
        """See `Coordinates.finish`."""
        operator, levels, c = task.operator, task.levels.to(u.device, u.dtype), task.operator.V_adjoint(u)
        deviation, _ = deviation_of(operator, u.shape, c, data["sigma"])
        known = is_known(deviation, levels.signal[-1:], levels.sigma[-1:], c)
        noise = data["noise"].value[-1] if isinstance(data["noise"], Shared) else levels.decay[-1] * data["noise"]
        last = torch.full((len(u),), len(levels.sigma) - 1, device=u.device)
        return operator.V(
            torch.where(known, torch.zeros_like(c), c) + self._known(levels, last, deviation, known, noise, data)
        )

    def _weight(self, levels: Levels) -> Tensor:
        return levels.signal if self.fresh else levels.weight

    def _known(
        self, levels: Levels, at: Tensor, deviation: Tensor, known: Tensor, noise: Tensor, data: dict[str, Any]
    ) -> Tensor:
        """K at states at: (n,), of components that are `known` there and of the others. noise: n there."""
        measured = data["measured"]
        weight = column(self._weight(levels)[at], measured)
        share = rest_of(weight, deviation, column(levels.sigma[at], measured))
        other = weight * guess_of(measured, deviation)
        if self.fresh:
            other = other + column(levels.kept[at], measured) * noise_of(measured, deviation)
        else:
            other = other + column(levels.decay[at], measured) * data["left"]
        return torch.where(known, weight * measured + share * noise, other)

    def _without_memory(self, left: Tensor, unknown: Tensor, deviation: Tensor, rows: Rows) -> Tensor:
        """w such that the next unknown is (signal' - k / tau) (x0 - m), whatever this one is. left: x0 - m."""
        carry, clean = rows.level("carry", left), rows.level("clean", left)
        over = torch.where(deviation > 0, deviation, 1)
        wanted = (rows.level("signal", left, 1) - rows.level("kept", left, 1) / over) * left - carry * unknown
        return torch.where(clean == 0, left, wanted / torch.where(clean == 0, 1, clean))


def guess_of(measured: Tensor, deviation: Tensor) -> Tensor:
    """m above; 0 where nothing is measured."""
    return measured / (1 + deviation.square())


def noise_of(measured: Tensor, deviation: Tensor) -> Tensor:
    """(ybar - m) / tau: the measurement's noise in units of its deviation, if m is the clean sample; 0 as above."""
    return measured * torch.where(deviation.isfinite(), deviation / (1 + deviation.square()), 0)


def rest_of(weight: Tensor | float, deviation: Tensor, sigma: Tensor) -> Tensor:
    """r above: what the measurement's noise leaves of a level's, as a share of that."""
    part = weight * torch.where(deviation.isfinite(), deviation, 0)  # an infinite one would make NaN, and NaN gradients
    return (1 - (part / torch.where(sigma > 0, sigma, 1)).square()).clamp_min(0).sqrt()


def _left(levels: Levels, known: list[Tensor], deviation: Tensor, measured: Tensor, noise: Tensor) -> Tensor:
    """(B, ...): K less its part in the clean guess where the model takes over, over `decay` there: it decays as noise.

    known: at every level; noise: (B, ...) at the start, or (T + 1, B, ...).
    """
    found, guess = torch.zeros_like(measured), guess_of(measured, deviation)
    for i, (now, after) in enumerate(pairwise(known)):
        ends = now & ~after
        weight, decay = float(levels.weight[i]), float(levels.decay[i])
        there = noise[i] if noise.dim() > measured.dim() else decay * noise
        share = rest_of(weight, deviation, levels.sigma[i].to(measured))
        left = weight * (measured - guess) + share * there
        found = torch.where(ends, left / decay, found)
    return found


def deviation_of(operator: Operator, shape: torch.Size, c: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Standard deviation of the noise in each component, infinite where nothing is measured, and 1 / s, 0 there.

    shape: of the images, (n, *shape); c: their coefficients; sigma: (n, 1).
    """
    inverse = invert(operator.singular_values(shape, c.device, c.dtype))
    noise = sigma.to(c).view(-1, *(1,) * (c.dim() - 1)) * inverse
    return torch.where(inverse > 0, noise, torch.inf), inverse


def is_known(deviation: Tensor, signal: Tensor, sigma: Tensor, like: Tensor) -> Tensor:
    """Which components the measurement decides at levels (n,) of noise."""
    return (column(signal, like) * deviation <= column(sigma, like)) & deviation.isfinite()
