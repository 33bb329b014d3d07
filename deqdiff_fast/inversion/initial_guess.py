"""Where an inversion starts: the flow that maps Gaussian data to its noise, without a model call."""

from __future__ import annotations

import torch
from torch import Tensor

from ..engine.workspace import Workspace
from ..schedule import Schedule, SpectralSlope


def fill_states(work: Workspace, spectrum: SpectralSlope | None, init_trajectory: Tensor | None) -> None:
    """States 0..T-1 of an opened problem: a given trajectory (T + 1, B, *shape), or the Gaussian flow; predictions by
    the linear model."""
    system, chain = work.system, work.chain
    if init_trajectory is not None:
        rows = init_trajectory[:-1].reshape(system.num_steps * system.batch, -1).to(system.device, system.dtype)
        chain.states[:-1].copy_(system.to_basis(rows).view_as(chain.states[:-1]))
    else:
        scale = flow_scale(system.schedule, spectrum).to(system.device, system.dtype)
        torch.mul(scale[:-1, None] / scale[-1], chain.states[-1], out=chain.states[:-1])
    torch.mul(system.diagonal_slope[:, None], chain.states[:-1], out=chain.predictions)


def flow_scale(schedule: Schedule, spectrum: SpectralSlope | None) -> Tensor:
    """(T + 1, 1) or (T + 1, D) float64: standard deviations of the states of Gaussian data (unit variance, or those of
    the spectrum). Its probability-flow trajectories keep x_i / scale_i constant (Song et al. 2021, arXiv 2011.13456).
    """
    variance = torch.ones(1, dtype=torch.float64) if spectrum is None else spectrum.variance.flatten()
    return (schedule.signal.square()[:, None] * variance + schedule.sigma.square()[:, None]).sqrt()
