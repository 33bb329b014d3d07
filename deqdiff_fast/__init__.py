"""deqdiff_fast: the sample of a diffusion chain, solved for all timesteps at once."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from .draft import ConvDraft
from .errors import (
    BackendUnavailableError,
    ConvergenceWarning,
    DeqDiffError,
    ModelOutputError,
    NonFiniteError,
    NotAffineError,
    NotConvergedError,
    StaleLeaseError,
)
from .gradient import Implicit, Phantom, Reversible, Unrolled
from .guidance import guided
from .inverter import DEQInverter, Inversion
from .memory import SolverMemory
from .sampler import DEQSampler
from .schedule import Schedule
from .solution import RoundInfo, Solution, Stats
from .solver import Anderson, Drafted, Picard, QuasiNewton
from .spectral import SpectralSlope

__version__ = "0.1.0"

__all__ = [
    "Anderson",
    "BackendUnavailableError",
    "ConvDraft",
    "ConvergenceWarning",
    "DEQInverter",
    "DEQSampler",
    "DeqDiffError",
    "Drafted",
    "Implicit",
    "Inversion",
    "ModelOutputError",
    "NonFiniteError",
    "NotAffineError",
    "NotConvergedError",
    "Phantom",
    "Picard",
    "QuasiNewton",
    "Reversible",
    "RoundInfo",
    "Schedule",
    "Solution",
    "SolverMemory",
    "SpectralSlope",
    "StaleLeaseError",
    "Stats",
    "Unrolled",
    "__version__",
    "guided",
]


def __getattr__(name: str) -> Any:
    if name == "integrations":  # on first use: the package itself needs none of them
        return import_module(f"{__name__}.integrations")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
