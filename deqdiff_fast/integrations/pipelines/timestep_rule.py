"""How the scheduler's timestep becomes that of a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

# of the timestep, the dtype that the model is given, N training timesteps, and the model's own timestep_scale: as
# pipelines compute it, rounding included
RULES: dict[str, Callable[[Tensor, torch.dtype, float, float], Tensor]] = {
    "t": lambda t, dtype, count, scale: t.to(dtype),
    "t / N": lambda t, dtype, count, scale: t.to(dtype) / count,
    "(t / N) rounded": lambda t, dtype, count, scale: (t / count).to(dtype),
    "scale t": lambda t, dtype, count, scale: (t * scale).to(dtype),
    "1 - t / N": lambda t, dtype, count, scale: (1 - t / count).to(dtype),
    "N - t": lambda t, dtype, count, scale: (count - t).to(dtype),
    "scale t rounded": lambda t, dtype, count, scale: t.to(dtype) * scale,
}
_UNLIKELY: WeakKeyDictionary[type, set[str]] = WeakKeyDictionary()  # of a class, which all own loops have in common


@dataclass(frozen=True, eq=False)
class TimestepRule:
    """One of RULES, and the places that are given it where a model takes a timestep for each token."""

    name: str
    dtype: torch.dtype
    own: torch.dtype  # of the scheduler's timesteps
    count: float
    scale: float
    mask: Tensor | None = None  # (R, S) of the dtype of the timesteps, ones and zeros

    def __call__(self, t: Tensor, copies: int, rows: Tensor) -> Tensor:
        """Those of a model, (copies * n,) or (copies * n, S), for the scheduler's t: (n,)."""
        times = self._of(t).repeat(copies)
        return times if self.mask is None else times[:, None] * self.mask.index_select(0, rows)

    def fits(self, given: Any, t: Tensor) -> bool:
        """Whether a model that was given this at the timestep t follows the rule."""
        given = torch.as_tensor(given)
        expected = self._of(t.to(given.device))
        return bool((given == (expected if self.mask is None else expected * self.mask)).all())

    def _of(self, t: Tensor) -> Tensor:
        return RULES[self.name](t.to(self.own), self.dtype, self.count, self.scale).to(self.dtype)


def find_rule(given: Any, t: Tensor, scheduler: Any, module: Any, pipeline: type) -> TimestepRule | None:
    """The first rule that gives a model this timestep for the scheduler's t; None: there is none."""
    given = torch.as_tensor(given)
    count = float(scheduler.config.get("num_train_timesteps", 1000))
    scale = float(getattr(getattr(module, "config", None), "timestep_scale", None) or 1.0)
    mask = None
    if given.dim() > 1:
        top = given.abs().amax()
        mask = (given != 0).to(given.dtype) if bool(((given == 0) | (given == top)).all()) and top > 0 else None
        if mask is None:
            return None
    elif bool((given != given.flatten()[0]).any()):
        return None
    for name in sorted(RULES, key=_UNLIKELY.get(pipeline, set()).__contains__):
        rule = TimestepRule(name, given.dtype, t.dtype, count, scale, mask)
        if rule.fits(given, t):
            return rule
    return None


def put_last(rule: TimestepRule, pipeline: type) -> None:
    """A later step has shown that a pipeline of this class has another rule, which says the same of the first one."""
    _UNLIKELY.setdefault(pipeline, set()).add(rule.name)
