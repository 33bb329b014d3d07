"""DDIM inversion: the chain run backwards with each prediction taken at the next state. Cheap and approximate."""

from __future__ import annotations

from dataclasses import dataclass

from .base import InversionProblem, MethodResult
from .fixed_point import FixedPoint


@dataclass(frozen=True)
class DDIMInversion:
    """x_i = (x_{i+1} - b_i eps_i(x_{i+1}) - drift_i) / a_i, one model call a step: fast and approximate.

    The prediction belongs at x_i: the difference is the error. Song et al. 2020, arXiv 2010.02502; Dhariwal and Nichol
    2021, arXiv 2105.05233, appendix F.
    """

    name = "ddim"
    exact = False

    def solve(self, problem: InversionProblem) -> MethodResult:
        """Find the noise, see `Method.solve`."""
        result = FixedPoint(iterations=1, sweeps=1).solve(problem)
        result.stats.solver = self.name
        result.stats.stop_reason = "approximate"
        return result
