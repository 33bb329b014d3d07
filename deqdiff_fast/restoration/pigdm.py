"""PiGDM: the score of the measurement through the Jacobian of the prediction, one vector-Jacobian product a row.

Song, Vahdat, Mardani, Kautz 2023 (ICLR, Pseudoinverse-Guided Diffusion Models), equations 7 and 8: with the clean
sample given x taken for Gaussian around the predicted one, of variance r_i^2,

    grad_x log p(y | x) = (d x0 / d x)^T A^T (r_i^2 A A^T + sigma_y^2)^-1 (y - A x0),

and by Tweedie's formula x0' = x0 + (sigma_i^2 / signal_i) grad log p(y | x). For data of unit variance the paper has
r_i^2 = sigma_i^2 / (signal_i^2 + sigma_i^2); low frequencies of images have fifty times as much and are pulled too far
by it, where nothing else damps the step. So the default is what no prior says: r_i = sigma_i / signal_i. Without noise
in the measurements the mean of the clean sample given them agrees with them, so x0' is projected onto that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..operators import Operator
from ..schedule import Schedule
from .base import Coordinates, Rows, positive
from .known_range import KnownRange, null_part
from .levels import column
from .plain import Plain
from .proximal import weighted_residual


@dataclass(frozen=True)
class PiGDM:
    """Restoration guided through the model's Jacobian, for any operator and schedule.

    Args:
        variance: of the data, v in r_i^2 = v sigma_i^2 / (v signal_i^2 + sigma_i^2): 1 in the paper, None for none.

    Raises:
        ValueError: a variance that is neither finite and > 0 nor None.
    """

    variance: float | None = None
    needs_vjp = True

    def __post_init__(self) -> None:
        if self.variance is not None:
            positive("variance", self.variance)

    @property
    def name(self) -> str:
        return "pigdm" if self.variance is None else f"pigdm({self.variance:g})"

    def check(self, operator: Operator, schedule: Schedule, noisy: bool) -> None:
        """See `Method.check`."""
        if bool((schedule.signal[:-1] == 0).any()):
            raise ValueError("schedule: expected a signal above 0 at every timestep for method='pigdm', got 0")

    def coordinates(self, noisy: bool) -> Coordinates:
        """See `Method.coordinates`."""
        return Plain() if noisy else KnownRange()

    def restored(self, x0: Tensor, x: Tensor, rows: Rows) -> Tensor:
        """x0' above."""
        signal, sigma = rows.levels.signal[rows.step], rows.levels.sigma[rows.step]
        prior = 0.0 if self.variance is None else 1 / self.variance
        variance = sigma.square() / (signal.square() + prior * sigma.square())
        if "y" in rows.data:
            noise = rows.data["sigma"][:, 0].to(variance).square().clamp_min(1e-12)
            towards = weighted_residual(rows.operator, x0, rows.data["y"].to(x0), variance, noise)
        else:
            off = rows.data["measured"] - x0 + null_part(rows.operator, x0)
            towards = off / column(variance, off)
        assert rows.vjp is not None
        towards = towards if torch.is_grad_enabled() and rows.differentiated else towards.detach()
        return x0 + column(sigma.square() / signal, x0) * rows.vjp(towards)
