"""The spectrum by the shape of a sample."""

from __future__ import annotations

import pytest
import torch

from deqdiff_fast import SpectralSlope
from deqdiff_fast.schedule.prior import OPPONENT, prior_spectrum
from deqdiff_fast.schedule.spectral import MIN_VARIANCE

SHAPES = [(3, 8, 8), (1, 32, 32), (4, 16, 8), (2, 64), (3, 50), (4, 3, 8, 8), (3, 2, 4, 4)]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_spectrum_for_every_space(shape):
    prior = prior_spectrum(shape)
    assert isinstance(prior, SpectralSlope)
    assert prior.shape == shape
    variance = prior.variance.view(shape)
    assert bool(variance.isfinite().all())
    assert variance.min() >= MIN_VARIANCE
    assert variance.mean().item() == pytest.approx(0.25, rel=1e-3)  # data scaled to [-1, 1]
    for axis in range(1, len(shape)):  # falls with the frequency along every axis
        assert bool((variance.diff(dim=axis) <= 0).all())


@pytest.mark.parametrize(("shape", "power"), [((1, 64, 64), 2), ((1, 3, 64, 64), 2), ((1, 64), 1)])
def test_it_falls_as_a_power_of_the_frequency(shape, power):
    row = prior_spectrum(shape).variance.flatten()[: shape[-1]]
    expected = (1 + torch.arange(64, dtype=row.dtype).square()) ** (power / 2)
    torch.testing.assert_close(row[0] / row, expected, rtol=1e-3, atol=0)


def test_colour_is_less_than_brightness():
    prior = prior_spectrum((3, 8, 8))
    variance = prior.variance.view(3, 8, 8)
    torch.testing.assert_close(variance[1:], (0.1 * variance[:1]).expand(2, 8, 8))
    grey = torch.tensor(OPPONENT[0], dtype=torch.float64) / 3**0.5
    torch.testing.assert_close(prior.channels[0], grey)
    torch.testing.assert_close(prior.channels @ prior.channels.mT, torch.eye(3, dtype=torch.float64))
    for shape in ((4, 8, 8), (3, 64), (3, 2, 8, 8)):  # latents, signals: their channels mean nothing that is known
        assert torch.equal(prior_spectrum(shape).channels, torch.eye(shape[0], dtype=torch.float64))


@pytest.mark.parametrize("shape", [(), (1,), (64,)])
def test_vectors_have_none(shape):
    assert prior_spectrum(shape) is None


@pytest.mark.parametrize("shape", SHAPES)
def test_its_basis_is_orthonormal(shape):
    basis = prior_spectrum(shape).basis()
    x = torch.randn(2, int(torch.tensor(shape).prod()), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    there = basis.forward(x.clone())
    torch.testing.assert_close(there.norm(dim=1), x.norm(dim=1))
    torch.testing.assert_close(basis.inverse(there.clone()), x)
