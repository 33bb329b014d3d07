"""How far the unknowns may be off: the error that is allowed is relative to the sample, of which they are a part."""

from __future__ import annotations

import torch
from torch import Tensor

from ..solution import Stats

CAUTION = 0.9
STEP, MOST = 4, 4.0  # quarters: a few factors, so that what a planner learns of one request serves the next


def looser(known: Tensor, unseen: float, variance: float) -> float:
    """By how much the relative error of the unknowns may exceed that of the sample, at a cautious guess.

    Args:
        known: (B, *shape), the known part of the sample.
        unseen: the part of the data's variance that is expected in the rest.
        variance: of the data, on the average over elements.
    """
    unseen = max(unseen, 1e-3)
    size = float(known.detach().flatten(1).double().square().mean(1).min())
    allowed = CAUTION * min(unseen**-0.5, (1 + size / (unseen * variance)) ** 0.5)
    return min(max(int(allowed * STEP) / STEP, 1.0), MOST)


def near_enough(stats: Stats, share: Tensor, factor: float, allowed: float) -> bool:
    """Whether a solve that was allowed `factor` times the error, `allowed`, has made samples that are within theirs.

    share: (B,), see `shares`.
    """
    if float(share.max()) * factor <= 1:
        return True
    on_nodes = 0 < stats.node_rounds == stats.rounds  # there the estimate is one of the error, not of a step
    return on_nodes and float((stats.error_estimate * share).max()) * factor <= allowed


def add_up(stats: Stats, spent: list[Stats]) -> None:
    """What solves before the last one took, onto its statistics."""
    for one in spent:
        for name in ("rounds", "node_rounds", "model_evals", "check_evals", "model_calls", "draft_evals"):
            setattr(stats, name, getattr(stats, name) + getattr(one, name))
        stats.wall_seconds += one.wall_seconds


def shares(known: Tensor, sample: Tensor) -> Tensor:
    """(B,) float64 on the CPU: the norm of the unknown part over that of the sample."""
    size = sample.detach().flatten(1).double().norm(dim=1).clamp_min(1e-300)
    found: Tensor = ((sample - known).detach().flatten(1).double().norm(dim=1) / size).cpu()
    return torch.where(found.isfinite(), found, 1.0)
