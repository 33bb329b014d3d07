"""Picard iteration: X <- Scan(E(X)). Every round makes at least one more state exact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..kernels import ddim_update, ddim_update_bytes
from ..loop.base import Bounds, Chain, Lease, Plan, Size


@dataclass(frozen=True)
class Picard:
    """Fixed-point iteration on the whole window (Shih et al. 2023, arXiv 2305.16317, without their stale rows)."""

    max_rounds: int | None = None
    guess: str = "gaussian"
    period: ClassVar[int] = 1
    safety: float = 0.3
    freeze: float = 0.003

    @property
    def name(self) -> str:
        return "picard"

    def plan(self, plan: Plan, size: Size) -> None:
        """Nothing to remember."""

    def scratch(self, size: Size) -> int:
        found: int = ddim_update_bytes(size.num_steps, size.batch, size.numel, size.dtype, size.device, size.backend)
        return found

    def start(self, lease: Lease) -> None:
        return None

    def step(self, chain: Chain, memory: Any, round: int) -> None:
        ddim_update(
            chain.states, chain.predictions, chain.state_coef, chain.model_coef, chain.lo, chain.hi,
            chain.sq_diff, chain.sq_norm, chain.drift, workspace=chain.scratch, backend=chain.backend,
        )  # fmt: skip

    def settle(self, chain: Chain, memory: Any, round: int, old: Bounds, new: Bounds) -> None:
        """The states are the plain step already."""

    def enter(self, chain: Chain, memory: Any, old: Bounds, new: Bounds) -> None:
        """Nothing to forget."""
