"""Where an inversion starts: the flow that maps Gaussian data to its noise, without a model call."""

from __future__ import annotations

import torch
from torch import Tensor

from ..engine.system import System
from ..engine.workspace import Workspace
from ..schedule import Schedule, SpectralSlope


def fill(work: Workspace, spectrum: SpectralSlope | None, init: Tensor | None) -> None:
    """States 0..T-1 of an opened task: a given trajectory, or the Gaussian flow; predictions by the linear model."""
    system, chain = work.system, work.chain
    if init is not None:
        rows = init[:-1].reshape(system.num_steps * system.batch, -1).to(system.device, system.dtype)
        chain.states[:-1].copy_(system.to_basis(rows).view_as(chain.states[:-1]))
    else:
        scale = flow_scale(system.schedule, spectrum).to(system.device, system.dtype)
        torch.mul(scale[:-1, None] / scale[-1], chain.states[-1], out=chain.states[:-1])
    fill_predictions(system, work)


def fill_predictions(system: System, work: Workspace) -> None:
    """Predictions of the linear model at the states."""
    torch.mul(system.diagonal_slope[:, None], work.chain.states[:-1], out=work.chain.predictions)


def flow_scale(schedule: Schedule, spectrum: SpectralSlope | None) -> Tensor:
    """(T + 1, 1) or (T + 1, D) float64: standard deviations of the states of Gaussian data (unit variance, or those of
    the spectrum). Its probability-flow trajectories keep x_i / scale_i constant (Song et al. 2021, arXiv 2011.13456).
    """
    variance = torch.ones(1, dtype=torch.float64) if spectrum is None else spectrum.variance.flatten()
    return (schedule.signal.square()[:, None] * variance + schedule.sigma.square()[:, None]).sqrt()
