"""What belongs to the rows of a call: numbers of timesteps and samples, and who else uses the memory of its input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._types import Model

_use_count: Any = getattr(torch._C, "_storage_Use_Count", None)


def row_tables(times: Tensor, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """(T B + 1,) each: the timestep, the sample and the model's time of row i B + b, the last one a spare row."""
    row = torch.arange(len(times) * batch + 1, device=times.device)
    step = (row // max(batch, 1)).clamp_max(len(times) - 1)
    return step, row % max(batch, 1), times[step]


def told_steps(model: Model) -> bool:
    """Whether a wrapper of ours wants `step=`, (n,) int64, the number of each row's timestep in the chain."""
    return bool(getattr(model, "deqdiff_told_steps", False))


def rough_in_time(model: Model) -> bool:
    """Whether a model says, by `deqdiff_rough_in_time`, that its predictions do not change smoothly from one timestep
    to the next: nothing is to be interpolated in between."""
    return bool(getattr(model, "deqdiff_rough_in_time", False))


def amplifies(model: Model) -> bool:
    """Whether a model says, by `deqdiff_amplifies`, that what an early state is off decides more than a denoiser's
    would: rows are then final only by the measure of samples that have stalled."""
    return bool(getattr(model, "deqdiff_amplifies", False))


def count_users(memory: Tensor) -> int:
    """How many tensors there are on its storage, anybody's; 0 where this torch does not tell."""
    return 0 if _use_count is None else int(_use_count(memory.untyped_storage()._cdata))
