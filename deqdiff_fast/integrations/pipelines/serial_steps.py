"""What a loop has made serially belongs to its solution, too."""

from __future__ import annotations

import torch
from torch import Tensor

from ...solution import Solution, Stats
from .first_step import is_tiled


def with_serial_steps(solution: Solution | None, sample: Tensor, halves: int | None, steps: int) -> Solution:
    """`solution` after some steps of the scheduler itself, of which the last one gave `sample`.

    Args:
        solution: of the steps before, None where there are none.
        halves: how often the samples occur in what is stepped; None: that is not known.
    """
    half = sample[: len(sample) // 2]
    if halves == 2 or (halves is None and len(half) and is_tiled(sample, half)):
        sample = half
    if solution is None:
        stats = Stats(solver="serial", window=1, stop_reason="serial")
        stats.error_estimate = torch.zeros(len(sample), dtype=torch.float64, device="cpu")
        solution = Solution(sample, torch.ones(len(sample), dtype=torch.bool, device="cpu"), stats)
    stats = solution.stats
    stats.finished_serially += steps
    stats.model_evals += steps * len(sample)
    stats.model_calls += steps
    if steps:
        solution.sample = sample
    return solution
