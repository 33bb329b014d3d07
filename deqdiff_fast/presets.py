"""The sampling settings of "Deep Equilibrium Approaches to Diffusion Models" (Pokle et al., 2022), by data set.

Section 5.1 and appendix of arXiv 2210.12867: DDIM with eta = 0, Anderson acceleration per timestep with history 5 and
ridge 1e-3, tolerance 1e-3, at most 15 rounds, every state started from the noise. The networks are the DDPM
checkpoints on the Hugging Face hub; nothing is clipped, as in the paper's code.
"""

from __future__ import annotations

from dataclasses import dataclass

PAPER_SOLVER = "deq-ddim"
PAPER_TOLERANCE = 1e-3
PAPER_ROUNDS = 15


@dataclass(frozen=True)
class Preset:
    """Everything that a run of the paper needs but the seed. `model` is a hub name, `spacing` picks the timesteps."""

    name: str
    model: str
    steps: int
    spacing: str
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
    if name not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]
