"""Inversion as one system: every state but the last unknown, all steps solved for their own states at once."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.inverse_scan import MAX_COLUMNS
from ..loop.base import LeasedTensors, MemoryRequest, ProblemSize, Solver
from ..schedule import SpectralSlope
from . import multistep
from .base import InversionStats, Outcome, Task, read_out


class Rings(NamedTuple):
    """Solver memory: the last rounds, and the chain run forwards through its linear model."""

    z: Tensor  # (H + 1, W, B, D) states at which the model was called
    e: Tensor  # (H + 1, W, B, D) its predictions
    filled: Tensor  # (W, B) int32
    long_z: Tensor  # the same for the stiff rows, with their longer history
    long_e: Tensor
    long_filled: Tensor
    forward: Tensor  # (T + 1, B, D)
    known_z: Tensor  # (1, T, B, D)
    known_e: Tensor  # (1, T, B, D)
    known: Tensor  # (T, B) int32


@dataclass(frozen=True)
class Equilibrium:
    """Solve G_i(x_i) = x_{i+1} for all steps i at once, given x_T: a batched model call and an inverse scan a round.

    The triangular system of Pokle, Geng, Kolter 2022 (arXiv 2210.12867, equation 9) from its other end, where each row
    is implicit in its own state; no gradient is taken. The steps that contract most, next to the image, are solved
    first, on their own; then all others together. A solve ends when the linear model of the chain around the states
    predicts a round-trip error of at most a third of the tolerance.

    history: rounds that the secants remember (0 to 7; 0: the slope alone); long_history: the same for the first, stiff
    steps (0 to 31). slope: "auto" (of the inverter's spectrum, else of the images' own), "scalar", a `SpectralSlope`,
    or None: then this is Anderson's method in each row, and with both histories 0 a damped Picard iteration.
    damping: part of the step along the slope that is taken. patience: rounds without progress before a row is left as
    it is; stiff rows have four times that. ridge, stale, floor, reach: see `kernels.inverse_scan`; ridge and floor are
    by default what rounding asks for. passes: most passes over a multistep schedule, see `multistep.solve`.
    """

    history: int = 5
    long_history: int = 30
    slope: Any = "auto"
    damping: float = 1.0
    patience: int = 12
    ridge: float | None = None
    stale: float = 8.0
    floor: float | None = None
    reach: float = 1.0
    passes: int = 30

    name = "equilibrium"
    exact = True

    def __post_init__(self) -> None:
        if isinstance(self.history, bool) or not isinstance(self.history, int) or not 0 <= self.history <= 7:
            raise ValueError(f"history: expected an int from 0 to 7, got {self.history!r}")
        if isinstance(self.long_history, bool) or not 0 <= self.long_history <= MAX_COLUMNS - 1:
            raise ValueError(f"long_history: expected an int from 0 to {MAX_COLUMNS - 1}, got {self.long_history!r}")
        slopes = ("auto", "scalar", None)
        if not isinstance(self.slope, SpectralSlope) and self.slope not in slopes:
            raise ValueError(f"slope: expected 'auto', 'scalar', a SpectralSlope or None, got {self.slope!r}")
        if isinstance(self.patience, bool) or not isinstance(self.patience, int) or self.patience < 1:
            raise ValueError(f"patience: expected an int >= 1, got {self.patience!r}")
        if isinstance(self.passes, bool) or not isinstance(self.passes, int) or self.passes < 1:
            raise ValueError(f"passes: expected an int >= 1, got {self.passes!r}")
        for field in ("damping", "ridge", "stale", "reach"):
            value = getattr(self, field)
            if not (value is None and field == "ridge") and not 0 < value < float("inf"):
                raise ValueError(f"{field}: expected a number > 0, got {value!r}")
        if self.floor is not None and not 0 <= self.floor < 1:
            raise ValueError(f"floor: expected a number in [0, 1), got {self.floor!r}")

    def solve(self, task: Task) -> Outcome:
        from .rounds import Rounds

        if task.schedule.lags > 1:
            return multistep.solve(self, task, self.passes)
        clock = time.perf_counter()
        spectrum = self._spectrum(task)
        system = task.system(spectrum if spectrum is not None else self.slope)
        stats = InversionStats(self.name, 0)
        rounds = Rounds(self, task, system, spectrum, stats)
        with rounds.sweep.work.lease:
            converged = rounds.run()
            noise, trajectory = read_out(rounds.sweep.work)
        stats.model_evals, stats.model_calls = system.model_evals, system.model_calls
        stats.wall_seconds = time.perf_counter() - clock
        return Outcome(noise, trajectory, converged, stats)

    def _spectrum(self, task: Task) -> SpectralSlope | None:
        """The spectrum to use: the given one, else that of the images themselves where they have spatial axes."""
        if isinstance(self.slope, SpectralSlope) or self.slope != "auto":
            return self.slope if isinstance(self.slope, SpectralSlope) else None
        if task.spectrum is not None or task.image.dim() < 4:
            return task.spectrum
        images = task.image.detach().double()
        return SpectralSlope.fit(torch.cat([images, -images]))  # a single image has no spread about its mean

    def planned(self, tail: int) -> Memory:
        return Memory(self.history, self.long_history, tail)


@dataclass(frozen=True)
class Memory(Solver):
    """What a solve asks of the slab, with `tail` stiff rows."""

    history: int
    long_history: int
    tail: int

    def plan_memory(self, request: MemoryRequest, size: ProblemSize) -> None:
        row = (size.batch, size.numel)
        for prefix, ring in (
            ("", (self.history + 1, size.window)),
            ("long_", (self.long_history + 1, max(self.tail, 1))),
        ):
            request.add(f"inverse.{prefix}z", (*ring, *row), size.dtype)
            request.add(f"inverse.{prefix}e", (*ring, *row), size.dtype)
            request.add(f"inverse.{prefix}filled", (ring[1], size.batch), torch.int32)
        request.add("inverse.forward", (size.num_steps + 1, *row), size.dtype)
        request.add("inverse.known_z", (1, size.num_steps, *row), size.dtype)
        request.add("inverse.known_e", (1, size.num_steps, *row), size.dtype)
        request.add("inverse.known", (size.num_steps, size.batch), torch.int32)

    def start(self, tensors: LeasedTensors) -> Rings:
        return Rings(*(tensors[f"inverse.{name}"] for name in Rings._fields))
