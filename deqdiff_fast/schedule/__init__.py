"""The sampling chain as numbers: coefficient tables, noise, spectra, and the plain chain. Torch only."""

from __future__ import annotations

from .clip import Clip
from .noise import check_generator
from .schedule import Schedule
from .spectral import Basis, SpectralSlope
from .tables import timesteps

__all__ = ["Basis", "Clip", "Schedule", "SpectralSlope", "check_generator", "timesteps"]
