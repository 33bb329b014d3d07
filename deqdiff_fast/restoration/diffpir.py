"""DiffPIR: a proximal step from the predicted clean sample towards the measurement.

Zhu et al. 2023, arXiv 2305.08995, algorithm 1 and equation 12: at level nu_i = sigma_i / signal_i

    x0' = argmin over z of ||A z - y||^2 + rho_i ||z - x0||^2,    rho_i = weight sigma_y^2 / nu_i^2.

Their zeta, the fresh noise of a step, is the schedule's eta. Without noise in the measurements rho is 0, and this is
DDNM.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..operators import Operator
from ..schedule import Schedule
from .base import Coordinates, Rows, positive
from .known_range import KnownRange
from .plain import Plain
from .proximal import proximal


@dataclass(frozen=True)
class DiffPIR:
    """Restoration by proximal steps, for any operator and schedule.

    Args:
        weight: the paper's lambda, 1 to 25 there, of the prediction against the measurement. At 1, x0' is what is to be
            expected of a clean sample that is Gaussian around the predicted one, of variance nu_i^2. The larger, the
            less is left of the measurement.

    Raises:
        ValueError: a weight that is not finite and > 0.
    """

    weight: float = 1.0
    needs_vjp = False

    def __post_init__(self) -> None:
        positive("weight", self.weight)

    @property
    def name(self) -> str:
        return f"diffpir({self.weight:g})"

    def check(self, operator: Operator, schedule: Schedule, noisy: bool) -> None:
        """See `Method.check`."""

    def coordinates(self, noisy: bool) -> Coordinates:
        """See `Method.coordinates`."""
        return Plain() if noisy else KnownRange()

    def restored(self, x0: Tensor, x: Tensor, rows: Rows) -> Tensor:
        """The minimiser above."""
        if "y" not in rows.data:  # the coordinates know the range
            return x0
        level = rows.levels.sigma[rows.step] / rows.levels.signal[rows.step].clamp_min(1e-12)
        rho = self.weight * (rows.data["sigma"][:, 0].to(level) / level).square()
        return proximal(rows.operator, x0, rows.data["y"].to(x0), rho.clamp_min(1e-12))
