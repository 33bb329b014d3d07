"""The slope of a restoring chain: how far the clean sample of a step follows its state.

Where the measurement or the method decides, the model's own slope is wrong: a component that DDRM draws anew at every
step has none of the state that it had, and a proximal step takes back what it knows better. So the slope is tried: the
method with the best linear denoiser of data of a given spectrum in the model's place, on random states. It is the
diagonal of that linear map in the basis of the spectrum (Hutchinson 1989, doi 10.1080/03610918908812806), one number
for each timestep and ring of equal frequency.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .._devices import with_torch_defaults
from ..operators import Operator
from ..schedule import Schedule, SpectralSlope
from ..schedule.spectral import average_rings
from .base import Method, Rows, Task
from .levels import Levels, column
from .slope import conditional_spectrum

ELEMENTS, MOST = 2**22, 32  # of all states that are tried, and states a timestep
LEAST = 1e-9  # power of a ring, relative to the largest, that tells nothing


@dataclass(frozen=True, eq=False)
class ChainSlope(SpectralSlope):
    """The slopes of one chain, timestep by timestep, in the basis of a spectrum.

    Args:
        variance, channels: see `SpectralSlope`.
        gains: (T, K), d clean sample / d state of every class of coefficients.
        which: (D,) int64, the class of each.
    """

    gains: Tensor
    which: Tensor

    @with_torch_defaults
    def classes(self, schedule: Schedule) -> tuple[Tensor, Tensor]:
        """See `SpectralSlope.classes`."""
        return _slope_of(self.gains, schedule), self.which

    @with_torch_defaults
    def slope(self, schedule: Schedule) -> Tensor:
        """See `SpectralSlope.slope`."""
        return _slope_of(self.gains, schedule)[:, self.which]


def _slope_of(gains: Tensor, schedule: Schedule) -> Tensor:
    """c with x0 = p x + q (c x), from d x0 / d x."""
    p, q = (part[:, None] for part in schedule.denoised_coef().unbind(1))
    return (gains - p) / q


@dataclass(frozen=True)
class LinearDenoiser:
    """E[x0 | x] of Gaussian data with a spectrum, on rows of states (n, *shape); self-adjoint."""

    spectrum: SpectralSlope
    levels: Levels

    def __call__(self, x: Tensor, step: Tensor) -> Tensor:
        basis, variance = self.spectrum.basis(), self.spectrum.variance.to(x)
        signal, sigma = (column(table[step], x) for table in (self.levels.signal, self.levels.sigma))
        gain = signal * variance / (signal.square() * variance + sigma.square())
        found = basis.inverse(basis.forward(x.flatten(1).clone()) * gain.flatten(1))
        return found.view_as(x)


def chain_slope(
    method: Method, operator: Operator, schedule: Schedule, levels: Levels, spectrum: SpectralSlope,
    sigma: float | None, batch: int, device: torch.device,
) -> tuple[ChainSlope, float]:  # fmt: skip
    """The slopes of a chain by `method`, and the part of the data's variance that the operator does not see.

    Args:
        spectrum: of the data.
        sigma: of the noise in the measurements, None for none.
        batch: how many samples the operator is for.
    """
    left_open, unseen = conditional_spectrum(operator, spectrum, sigma or 0.0, batch, device)
    shape, steps = spectrum.shape, schedule.num_steps
    count = max(1, min(MOST, ELEMENTS // (steps * spectrum.variance.numel())))
    states = torch.randn(count, *shape, generator=torch.Generator().manual_seed(0)).to(device)
    at = torch.arange(count, device=device)
    operator, levels = operator.for_samples(at % batch), levels.to(device, states.dtype)
    y, noisy = operator.A(torch.zeros_like(states)), sigma is not None
    level = None if sigma is None else y.new_full((count, 1), sigma)
    coordinates, denoiser = method.coordinates(noisy), LinearDenoiser(spectrum, levels)
    data = coordinates.begin(Task(operator, schedule, levels, y, level), torch.zeros_like(states), None).data
    basis, which = spectrum.basis(), _rings(shape)
    told = torch.zeros(2, steps, int(which.max()) + 1, dtype=torch.float64)
    with torch.no_grad():
        for i in range(steps):
            step = torch.full((count,), i, device=states.device)
            rows = Rows(step, at, operator, data, levels)
            x, unknown = coordinates.state(states, rows)
            rows.vjp = lambda v: denoiser(v, step)  # noqa: B023
            w = coordinates.clean(method.restored(denoiser(x, step), x, rows), unknown, rows)
            u, w = (basis.forward(part.flatten(1).clone()).double() for part in (unknown, w))
            told[:, i].index_add_(1, which, torch.stack([(u * u).sum(0), (u * w).sum(0)]).cpu())
    power, product = told
    usable = power > LEAST * power.amax(1, keepdim=True)
    gains = torch.where(usable, product / torch.where(usable, power, 1), 0)
    return ChainSlope(left_open.variance, spectrum.channels, gains, which), unseen


def _rings(shape: tuple[int, ...]) -> Tensor:
    """(D,) int64: the number of the ring of equal frequency, and channel, of every coefficient."""
    draw = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    which: Tensor = torch.unique(average_rings(draw).flatten(), return_inverse=True)[1]
    return which
