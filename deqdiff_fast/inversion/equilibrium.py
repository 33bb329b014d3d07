"""Inversion as one system: every state but the last unknown, all steps solved for their own states at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .._devices import float64
from ..kernels.inverse_scan import MAX_COLUMNS
from ..schedule import SpectralSlope
from . import multistep
from .base import InversionProblem, InversionStats, MethodResult, check_count, noise_and_trajectory
from .equilibrium_loop import EquilibriumLoop

MAX_HISTORY = 7


@dataclass(frozen=True)
class Equilibrium:
    """Solve G_i(x_i) = x_{i+1} for all steps i at once, given x_T: a batched model call and an inverse scan a round.

    The triangular system of Pokle, Geng, Kolter 2022 (arXiv 2210.12867, equation 9) from its other end, where each row
    is implicit in its own state; no gradient is taken. The steps that contract most, next to the image, are solved
    first, on their own; then all others together. A solve ends when the linear model of the chain around the states
    predicts a round-trip error of at most a third of the tolerance.

    Args:
        history: rounds that the secants remember, 0 (the slope alone) to 7.
        long_history: the same for the first, stiff steps, 0 to 31.
        slope: "auto" (of the inverter's spectrum, else of the images' own), "scalar", a `SpectralSlope`, or None: then
            this is Anderson's method in each row, and with both histories 0 a damped Picard iteration.
        damping: part of the step along the slope that is taken, > 0.
        patience: rounds without progress before a row is left as it is; stiff rows have four times that.
        ridge, stale, floor, reach: see `kernels.inverse_scan`; ridge and floor None: what rounding asks for.
        passes: most passes over a multistep schedule, see `multistep.solve`.

    Raises:
        ValueError: a setting is out of its range.
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
        for name, most in (("history", MAX_HISTORY), ("long_history", MAX_COLUMNS - 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
                raise ValueError(f"{name}: expected an int from 0 to {most}, got {value!r}")
        if not isinstance(self.slope, SpectralSlope) and self.slope not in ("auto", "scalar", None):
            raise ValueError(f"slope: expected 'auto', 'scalar', a SpectralSlope or None, got {self.slope!r}")
        check_count("patience", self.patience)
        check_count("passes", self.passes)
        for name in ("damping", "ridge", "stale", "reach"):
            value = getattr(self, name)
            if not (value is None and name == "ridge") and not 0 < value < float("inf"):
                raise ValueError(f"{name}: expected a number > 0, got {value!r}")
        if self.floor is not None and not 0 <= self.floor < 1:
            raise ValueError(f"floor: expected a number in [0, 1), got {self.floor!r}")

    def solve(self, problem: InversionProblem) -> MethodResult:
        """Find the noise, see `Method.solve`."""
        if problem.schedule.lags > 1:
            return multistep.solve(self, problem, self.passes)
        spectrum = self._spectrum(problem)
        system = problem.system(spectrum if spectrum is not None else self.slope)
        stats = InversionStats(self.name, 0)
        loop = EquilibriumLoop(self, problem, system, spectrum, stats)
        with loop.work.lease:
            converged = loop.run()
            noise, trajectory = noise_and_trajectory(loop.work)
        stats.model_evals, stats.model_calls = system.model_evals, system.model_calls
        return MethodResult(noise, trajectory, converged, stats)

    def _spectrum(self, problem: InversionProblem) -> SpectralSlope | None:
        """The spectrum to use: the given one, else that of the images themselves where they have spatial axes."""
        if isinstance(self.slope, SpectralSlope) or self.slope != "auto":
            return self.slope if isinstance(self.slope, SpectralSlope) else None
        if problem.norm is not None:  # which has coordinates of its own
            return None
        if problem.spectrum is not None or problem.image.dim() < 4:
            return problem.spectrum
        images = float64(problem.image.detach())
        return SpectralSlope.fit(torch.cat([images, -images]))  # a single image has no spread about its mean
