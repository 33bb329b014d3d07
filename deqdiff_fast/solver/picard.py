"""Picard iteration: X <- Scan(E(X)). Every round makes at least one more state exact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..kernels import ddim_update, ddim_update_bytes
from ..loop.base import Chain, ProblemSize, Solver


@dataclass(frozen=True)
class Picard(Solver):
    """Fixed-point iteration on the whole window (Shih et al. 2023, arXiv 2305.16317, without their stale rows).

    Args:
        max_rounds: rounds before giving up, None for T.
        guess: "gaussian" or "copy", see `Solver`.
        safety, freeze: see `Solver`.
    """

    max_rounds: int | None = None
    guess: str = "gaussian"
    safety: float = 0.3
    freeze: float = 0.003

    @property
    def period(self) -> int:
        return 1

    def scratch_bytes(self, size: ProblemSize) -> int:
        found: int = ddim_update_bytes(size.num_steps, size.batch, size.numel, size.dtype, size.device, size.backend)
        return found

    def step(self, chain: Chain, memory: Any, round: int) -> None:
        ddim_update(
            chain.states, chain.predictions, chain.state_coef, chain.model_coef, chain.lo, chain.hi,
            chain.sq_diff, chain.sq_norm, chain.drift, workspace=chain.scratch, backend=chain.backend,
        )  # fmt: skip
