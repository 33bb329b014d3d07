"""The slope of a restoring chain: how far a clean sample follows the state, with the method and the operator in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import deqdiff_fast as dq
from deqdiff_fast.operators import Blur, Inpaint, Operator
from deqdiff_fast.restoration import resolve
from deqdiff_fast.restoration.gains import chain_slope
from deqdiff_fast.restoration.levels import Levels
from deqdiff_fast.schedule.prior import prior_spectrum

SHAPE = (3, 8, 8)


class GaussianModel:
    """The exact noise prediction for Gaussian data with a spectrum, a dense matrix for each timestep."""

    def __init__(self, schedule: dq.Schedule, spectrum: dq.SpectralSlope) -> None:
        self.timesteps, slope = schedule.timesteps, spectrum.slope(schedule)
        unit = torch.eye(slope.shape[1], dtype=torch.float64)
        self.matrix = spectrum.basis().inverse(unit.clone())  # row k: coefficient k as an image
        self.slope = slope

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        step = (self.timesteps[None] == t[:, None]).long().argmax(1)
        coefficients = x.double().flatten(1) @ self.matrix.T
        return (self.slope[step] * coefficients @ self.matrix).view_as(x).to(x)


def slopes(method: str, operator: Operator, schedule: dq.Schedule, sigma: float) -> Tensor:
    """(T, *shape) the gains."""
    spectrum = prior_spectrum(SHAPE)
    assert spectrum is not None
    found, _ = chain_slope(
        resolve(method), operator, schedule, Levels.of(schedule), spectrum, sigma or None, 1, torch.device("cpu")
    )
    return found.gains[:, found.which].view(-1, *SHAPE)


def denoised(schedule: dq.Schedule) -> Tensor:
    """(T, *shape) what a denoiser of such data keeps of a coefficient."""
    spectrum = prior_spectrum(SHAPE)
    assert spectrum is not None
    signal, sigma = (table[:-1].view(-1, 1, 1, 1) for table in (schedule.signal, schedule.sigma))
    return signal * spectrum.variance / (signal.square() * spectrum.variance + sigma.square())


def ring(values: Tensor) -> Tensor:
    """Those of frequency zero, a ring of one coefficient for each channel."""
    return values[:, :, 0, 0]


def test_a_proximal_step_takes_back_what_it_knows(ddim: Any) -> None:
    """All pixels are measured: x0' = (y + rho x0) / (1 + rho)."""
    schedule, sigma = ddim(8), 0.3
    operator = Inpaint(torch.ones(8, 8, dtype=torch.bool))
    rho = (sigma * schedule.signal[:-1] / schedule.sigma[:-1]).square()[:, None]
    expected = ring(denoised(schedule)) * rho / (1 + rho)
    assert torch.allclose(ring(slopes("diffpir", operator, schedule, sigma)), expected, rtol=1e-3)


@pytest.mark.parametrize("eta", [0.0, 0.85])
def test_what_ddrm_draws_anew_has_no_memory(ddim: Any, eta: float) -> None:
    """Below its level x' = (signal' - k / tau) x0 + ..., so carry + clean gain is that of x0 alone."""
    schedule, sigma = ddim(40, eta), 0.3
    levels = Levels.of(schedule)
    gains = ring(slopes("ddrm", Inpaint(torch.ones(8, 8, dtype=torch.bool)), schedule, sigma))
    known = levels.signal * sigma <= levels.sigma
    step = levels.carry[:, None] + levels.clean[:, None] * gains
    kept = (levels.signal[1:] - levels.kept[1:] / sigma)[:, None] * ring(denoised(schedule))
    below = ~known[:-1] & ~known[1:]
    assert int(below.sum()) >= 4
    assert torch.allclose(step[below], kept[below], rtol=1e-3, atol=1e-6)
    assert float(gains[known[1:]].abs().max()) < 1e-6  # the measurement decides


@pytest.mark.parametrize("eta", [0.0, 0.85])
@pytest.mark.parametrize("method", ["ddnm", "ddrm", "diffpir", "pigdm"])
def test_a_chain_that_is_as_the_slope_says_takes_few_rounds(
    ddim: Any, relative_error: Any, method: str, eta: float
) -> None:
    """Gaussian data, a blur that mirrors at the borders: all that happens is diagonal in the basis of the spectrum."""
    schedule, spectrum, sigma = ddim(40, eta), prior_spectrum(SHAPE), 0.1
    operator = Blur(torch.tensor([[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]]).double() / 16, "replicate")
    y = operator.A(0.5 * torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    restorer = dq.DEQRestorer(
        GaussianModel(schedule, spectrum), schedule, operator, sigma=sigma, method=method, spectrum=spectrum,
        solver=dq.QuasiNewton(nodes=False), tol=1e-4,
    )  # fmt: skip
    expected, found = (
        solve(y, generator=torch.Generator().manual_seed(0)) for solve in (restorer.serial, restorer.restore)
    )
    assert float(relative_error(found.sample, expected.sample).max()) < 1e-4
    assert found.stats.rounds <= 8, found.stats.rounds
