"""Quasi-Newton: the model linearised at the old iterate, the linear system solved exactly by a scan over time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import newton_scan, newton_scan_bytes
from ..loop.base import Bounds, Chain, LeasedTensors, MemoryRequest, ProblemSize, Solver
from ..loop.rows import clear_rows
from .settings import check_history_dtype, check_secant_settings, history_dtype


class NewtonMemory(NamedTuple):
    z: Tensor  # (H + 1, W, B, D) states at which the model was called, a ring over rounds and over timesteps
    e: Tensor  # (H + 1, W, B, D) its predictions
    filled: Tensor  # (W, B) int32


@dataclass(frozen=True)
class QuasiNewton(Solver):
    """X <- the exact solution of the chain whose predictions are linear, E + J (x - X), around the last evaluation.

    J is a diagonal slope plus a multisecant correction from the last rounds. The fixed point does not depend on J.
    Sources: Lim et al. 2024, arXiv 2309.12252; Gonzalez et al. 2024, arXiv 2407.19115; Fang and Saad 2009.

    Args:
        history: rounds whose secants are kept, 0 to 7; 0 for the slope alone.
        slope: "scalar", the slope of unit Gaussian data; "spectral" or a `SpectralSlope`, one slope for every
            coefficient of the data's spectrum ("spectral" wants the sampler to be given one); "auto", spectral where
            the sampler was given one, else scalar; None, no slope.
        ridge: of the secant fit, relative.
        floor: shortest step worth keeping, relative to the state.
        max_rounds, tol, guess, safety, freeze, strict: see `Solver`.
        nodes: whether the first rounds evaluate a few timesteps only (see `deqdiff_fast.nodes`).
        history_dtype: what the history is stored in (None: as the states); bfloat16 halves its memory and traffic and
            blunts the secants, but cannot move the fixed point.

    Raises:
        ValueError: a bad setting, by its name.
    """

    history: int = 3
    slope: Any = "auto"
    ridge: float = 1e-6
    floor: float = 1e-5
    max_rounds: int | None = None
    tol: float | None = None
    guess: str = "gaussian"
    safety: float = 0.7
    freeze: float = 0.01
    strict: float | None = 0.01
    nodes: bool = True
    history_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        check_secant_settings(self.history, self.ridge, self.floor, self.nodes, self.max_rounds)
        if isinstance(self.slope, str) and self.slope not in ("auto", "scalar", "spectral"):
            raise ValueError(
                f"slope: expected 'auto', 'scalar', 'spectral', a SpectralSlope or None, got {self.slope!r}"
            )
        check_history_dtype(self.history_dtype)

    @property
    def name(self) -> str:
        if self.slope == "auto":
            return "quasi-newton"
        kind = self.slope if isinstance(self.slope, str) else "plain" if self.slope is None else "spectral"
        return f"quasi-newton-{kind}"

    @property
    def period(self) -> int:
        return self.history + 1

    def for_adjoint(self) -> QuasiNewton:
        return replace(self, slope="scalar" if self.slope == "auto" else self.slope, nodes=False)

    def plan_memory(self, request: MemoryRequest, size: ProblemSize) -> None:
        ring = (self.history + 1, size.window, size.batch, size.numel)
        stored = history_dtype(self.history_dtype, size)
        request.add("newton.z", ring, stored)
        request.add("newton.e", ring, stored)
        request.add("newton.filled", ring[1:3], torch.int32)

    def scratch_bytes(self, size: ProblemSize) -> int:
        found: int = newton_scan_bytes(
            size.num_steps, size.batch, size.numel, self.history, size.lags, size.dtype,
            history_dtype(self.history_dtype, size), size.device, size.backend,
        )  # fmt: skip
        return found

    def start(self, tensors: LeasedTensors) -> NewtonMemory:
        memory = NewtonMemory(*(tensors[f"newton.{name}"] for name in NewtonMemory._fields))
        memory.filled.zero_()
        return memory

    def step(self, chain: Chain, memory: NewtonMemory, round: int) -> None:
        newton_scan(
            chain.states, chain.predictions, chain.state_coef, chain.model_coef, chain.slope, chain.lo, chain.hi,
            chain.sq_diff, chain.sq_norm, memory.z, memory.e, memory.filled, round % (self.history + 1),
            self.ridge, self.floor, chain.drift, workspace=chain.scratch, backend=chain.backend,
        )  # fmt: skip

    def enter(self, chain: Chain, memory: NewtonMemory, old: Bounds, new: Bounds) -> None:
        clear_rows(memory.filled, old, new)
