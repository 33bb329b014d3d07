"""deqdiff_fast: the sample of a diffusion chain, solved for all timesteps at once."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from . import operators
from ._types import shared
from .distillation import distill
from .equilibrium import EquilibriumInfo, equilibrium
from .errors import (
    BackendUnavailableError,
    ConvergenceWarning,
    DamagedPairsError,
    DeqDiffError,
    ModelOutputError,
    NonFiniteError,
    NotAffineError,
    NotConvergedError,
    PairsMismatchError,
    RankError,
    StaleLeaseError,
)
from .gradient.implicit import Implicit
from .gradient.phantom import Phantom
from .gradient.reversible import Reversible
from .gradient.unrolled import Unrolled
from .inverter import DEQInverter, Inversion
from .memory import SolverMemory
from .model.conv_draft import ConvDraft
from .model.draft import Draft
from .model.guidance import guided
from .model.recording import Recording
from .ranks import sharded
from .restoration.result import FittedNoise, Restoration
from .restorer import DEQRestorer
from .sampler import DEQSampler
from .schedule import Schedule, SpectralSlope
from .solution import RoundInfo, Solution, Stats
from .solver.anderson import Anderson
from .solver.draft import Drafted
from .solver.picard import Picard
from .solver.quasi_newton import QuasiNewton

__version__ = "0.1.0"

__all__ = [
    "Anderson",
    "BackendUnavailableError",
    "ConvDraft",
    "ConvergenceWarning",
    "DEQInverter",
    "DEQRestorer",
    "DEQSampler",
    "DamagedPairsError",
    "DeqDiffError",
    "Draft",
    "Drafted",
    "EquilibriumInfo",
    "FittedNoise",
    "Implicit",
    "Inversion",
    "ModelOutputError",
    "NonFiniteError",
    "NotAffineError",
    "NotConvergedError",
    "PairsMismatchError",
    "Phantom",
    "Picard",
    "QuasiNewton",
    "RankError",
    "Recording",
    "Restoration",
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
    "distill",
    "equilibrium",
    "guided",
    "operators",
    "sharded",
    "shared",
]


def __getattr__(name: str) -> Any:
    if name == "integrations":  # on first use: the package itself needs none of them
        return import_module(f"{__name__}.integrations")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
