"""The spectrum of what a measurement leaves open: the solver's slope knows the operator.

For Gaussian data z of covariance S and measurements y = A z + sigma n, what is left is e = z - E[z | y] with

    E[z | y] = B argmin over v of ||A B v - y||^2 + sigma^2 ||v||^2,    S = B B^T.

Its power in the basis of the spectrum is that of samples z drawn from S, averaged over rings of equal frequency. Where
the measurement decides it is 0, and where it does not the data's own, less what its neighbours tell.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..operators import Operator, least_squares
from ..schedule import SpectralSlope
from ..schedule.spectral import MIN_VARIANCE, average_rings

PROBED = 2**17  # elements of the samples that are drawn
FEWEST, MOST = 2, 32  # samples
ITERATIONS = 60
LEAST_NOISE = 1e-3  # what is taken for the noise of measurements without any, so that the system can be solved


def conditional_spectrum(
    operator: Operator, spectrum: SpectralSlope, sigma: float, batch: int, device: torch.device
) -> tuple[SpectralSlope, float]:
    """The spectrum of what measurements with noise of standard deviation sigma leave open of data with `spectrum`, and
    by how much of such data's variance the best guess for data of unit variance is off (the known part of noisy DDNM).

    batch: how many samples the operator is for.
    """
    shape, basis = spectrum.shape, spectrum.basis()
    count = max(FEWEST, min(MOST, PROBED // spectrum.variance.numel()))
    deviation = spectrum.variance.sqrt().flatten().float().to(device)
    draw = torch.Generator().manual_seed(0)  # another one each time would make solves differ

    def white(*size: int) -> Tensor:
        return torch.randn(*size, generator=draw).to(device)

    def coloured(v: Tensor) -> Tensor:
        return basis.inverse(v.flatten(1) * deviation).view(len(v), *shape)

    def whitened(x: Tensor) -> Tensor:
        return (basis.forward(x.flatten(1).clone()) * deviation).view(len(x), *shape)

    with torch.no_grad():
        rows = operator.for_samples(torch.arange(count, device=device) % batch)
        data = coloured(white(count, *shape))
        y = rows.A(data)
        y, noise = y + sigma * white(*y.shape), max(sigma, LEAST_NOISE) ** 2
        found = least_squares(
            lambda v: rows.A(coloured(v)), lambda y: whitened(rows.A_adjoint(y)), y, damping=noise, tol=LEAST_NOISE,
            max_steps=ITERATIONS,
        )  # fmt: skip
        left = data - coloured(found)
        seen = least_squares(rows.A, rows.A_adjoint, y, damping=noise, tol=LEAST_NOISE, max_steps=ITERATIONS)
        unseen = float((data - seen).square().sum() / data.square().sum())
        power = basis.forward(left.flatten(1).contiguous()).view(count, *shape).double().square().mean(0).cpu()
    return SpectralSlope(average_rings(power).clamp_min(MIN_VARIANCE), spectrum.channels), min(unseen, 1.0)
