"""Coordinates for measurements without noise: what the operator sees of a state is known.

With P = A^+ A, the range part of the clean sample is A^+ y at every step, so that of the state is

    K_i = weight_i A^+ y + n_i

with n the noise that the chain has there, a recursion without any model. The unknown is u = x - K in the null space,
its clean sample w = (1 - P) x0. This is DDNM (Wang, Yu, Zhang 2022, arXiv 2212.00490, equation 13), the known taken
out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._types import Shared, shared
from ..operators import Operator
from ..operators.base import compute_dtype
from .base import Rows, Start, Task


@dataclass(frozen=True)
class KnownRange:
    """See above. fresh: the noise in the range is drawn anew at every step (DDRM) instead of carried along."""

    fresh: bool = False

    def begin(self, task: Task, noise: Tensor, draws: Tensor | None) -> Start:
        """See `Coordinates.begin`."""
        operator, null = task.operator, null_part(task.operator, noise)
        data: dict[str, Any] = {"measured": operator.A_dagger(task.y), "noise": noise - null}
        if draws is not None:
            nulls = torch.stack([null_part(operator, draw) for draw in draws])
            in_range, draws = draws - nulls, nulls
            if self.fresh:
                scale = task.levels.sigma[1:].to(noise)
                path = torch.cat([data["noise"][None], in_range * scale.view(-1, *(1,) * noise.dim())])
            else:
                path = task.levels.noise_path(task.schedule, data["noise"], in_range)
            data["noise"] = shared(path)
        return Start(null, task.frozen(draws), data)

    def state(self, u: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """See `Coordinates.state`."""
        unknown, noise = null_part(rows.operator, u), rows.data["noise"]
        if noise.dim() > u.dim():
            noise = noise[rows.step, rows.sample]
        else:
            noise = rows.level("decay", u) * noise
        return unknown + rows.level(self._weight, u) * rows.data["measured"] + noise, unknown

    def clean(self, x0: Tensor, unknown: Tensor, rows: Rows) -> Tensor:
        """See `Coordinates.clean`."""
        return null_part(rows.operator, x0)

    def finish(self, u: Tensor, task: Task, data: dict[str, Any]) -> Tensor:
        """See `Coordinates.finish`."""
        levels, noise = task.levels, data["noise"]
        noise = noise.value[-1] if isinstance(noise, Shared) else float(levels.decay[-1]) * noise
        known: Tensor = float(getattr(levels, self._weight)[-1]) * data["measured"] + noise
        return null_part(task.operator, u) + known

    @property
    def _weight(self) -> str:
        return "signal" if self.fresh else "weight"


def null_part(operator: Operator, x: Tensor) -> Tensor:
    """(1 - A^+ A) x; by singular vectors where there are such, for what is measured badly would leave its rounding."""
    if not operator.decomposed:
        return x - operator.A_dagger(operator.A(x))
    c = operator.V_adjoint(x)
    measured = operator.singular_values(x.shape, x.device, compute_dtype(x.dtype)) > 0
    return operator.V(torch.where(measured, torch.zeros_like(c), c))
