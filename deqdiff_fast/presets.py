"""The settings of "Deep Equilibrium Approaches to Diffusion Models" (Pokle et al., 2022), by data set.

Sampling, section 5.1 and appendix of arXiv 2210.12867: DDIM with eta = 0, Anderson acceleration per timestep with
history 5 and ridge 1e-3, tolerance 1e-3, at most 15 rounds, every state started from the noise. The networks are the
DDPM checkpoints on the Hugging Face hub; nothing is clipped, as in the paper's code.

Inversion, sections 4.2 and 5.3 and the configurations of the paper's code: Adam on the noise, a phantom gradient with
tau = 0.1 and one step, until the squared loss is 0.5; inside, Anderson acceleration per timestep with history 3,
damping 0.9 and tolerance 1e-2, at most 15 rounds, from copies of the noise. The baseline is back-propagation through
the serial chain. The noise starts at random, as in the paper (its code offers DDIM inversion as well).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

from .gradient.phantom import Phantom
from .solver.anderson import Anderson

PAPER_SOLVER = "deq-ddim"
PAPER_TOLERANCE = 1e-3
PAPER_ROUNDS = 15
AnyPreset = TypeVar("AnyPreset")


@dataclass(frozen=True)
class Preset:
    """Everything that a run of the paper needs but the seed."""

    name: str
    model: str  # on the Hugging Face hub
    steps: int  # T
    spacing: str  # of `timesteps`
    eta: float = 0.0
    solver: str = PAPER_SOLVER
    tol: float = PAPER_TOLERANCE
    max_rounds: int = PAPER_ROUNDS


PRESETS = {
    preset.name: preset
    for preset in (
        Preset("cifar10", "google/ddpm-cifar10-32", steps=1000, spacing="quad"),
        # The paper's CelebA network is 64x64 and not on the hub; this is the 256x256 one of the same family.
        Preset("celeba", "google/ddpm-ema-celebahq-256", steps=500, spacing="leading"),
        Preset("bedroom", "google/ddpm-ema-bedroom-256", steps=25, spacing="leading"),
        Preset("church", "google/ddpm-ema-church-256", steps=25, spacing="leading"),
    )
}


def preset(name: str) -> Preset:
    """The preset called `name`. Raises ValueError, which lists the names there are."""
    return _find(PRESETS, name)


def inversion_solver() -> Anderson:
    """The solver inside the paper's inversion."""
    return Anderson(
        scope="timestep", history=3, ridge=1e-3, relative_ridge=False, damping=0.9, stale=float("inf"), guess="copy",
        max_rounds=15, tol=1e-2, label="deq-ddim-inversion",
    )  # fmt: skip


@dataclass(frozen=True)
class InversionPreset:
    """Everything that an inversion of the paper needs but images and seed; the model is that of the `Preset`."""

    name: str
    steps: int  # T
    lr: float  # of Adam
    epochs: int  # steps of Adam, at most
    baseline_lr: float
    baseline_epochs: int
    eta: float = 0.0
    spacing: str = "leading"
    stop: float = 0.5  # squared loss at which it ends
    tau: float = 0.1  # damping of the phantom gradient
    phantom_steps: int = 1

    def options(self) -> dict[str, Any]:
        """Arguments of `DEQInverter` for the paper's own method."""
        return {
            "method": "gradient", "gradient": Phantom(self.tau, self.phantom_steps), "lr": self.lr,
            "steps": self.epochs, "stop": self.stop, "initial": "random", "solver": inversion_solver(),
            "warm_start": False, "finish": False,
        }  # fmt: skip

    def baseline(self) -> dict[str, Any]:
        """Arguments of `DEQInverter` for the serial baseline that the paper compares with."""
        return {
            "method": "gradient", "baseline": "bptt", "lr": self.baseline_lr, "steps": self.baseline_epochs,
            "stop": self.stop, "initial": "random",
        }  # fmt: skip


# The stochastic settings of CelebA, bedrooms and churches come without learning rates: here the deterministic ones.
_TRAINING = {  # lr, epochs, and those of the baseline
    "cifar10": (5e-3, 1000, 1e-2, 1000),
    "celeba": (1e-2, 2500, 1e-2, 2500),
    "bedroom": (5e-3, 500, 5e-3, 2000),
    "church": (5e-3, 500, 5e-3, 2000),
}
INVERSION_PRESETS = {
    preset.name: preset
    for preset in (
        InversionPreset("cifar10", 1000, *_TRAINING["cifar10"]),
        InversionPreset("celeba", 20, *_TRAINING["celeba"]),
        InversionPreset("bedroom", 10, *_TRAINING["bedroom"]),
        InversionPreset("church", 10, *_TRAINING["church"]),
        InversionPreset("cifar10-stochastic", 10, 1e-2, 1000, 1e-2, 1000, eta=1.0),
        InversionPreset("celeba-stochastic", 20, *_TRAINING["celeba"], eta=0.1),
        InversionPreset("bedroom-stochastic", 10, *_TRAINING["bedroom"], eta=0.5),
        InversionPreset("church-stochastic", 10, *_TRAINING["church"], eta=0.5),
    )
}


def inversion_preset(name: str) -> InversionPreset:
    """The inversion preset called `name`. Raises ValueError, which lists the names there are."""
    return _find(INVERSION_PRESETS, name)


def _find(presets: dict[str, AnyPreset], name: str) -> AnyPreset:
    if name not in presets:
        raise ValueError(f"preset: expected one of {', '.join(presets)}, got {name!r}")
    return presets[name]
