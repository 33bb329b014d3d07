"""The spectral slope: an orthonormal basis, a fit that finds the spectrum, and a solver that gains from it."""

from __future__ import annotations

import pytest
import torch

import deqdiff_fast as dq
from deqdiff_fast.schedule.spectral import Basis, dct_matrix


def smooth_images(count: int, shape=(3, 16, 16), seed: int = 0) -> torch.Tensor:
    """Gaussian images with a 1/f spectrum and correlated channels."""
    g = torch.Generator().manual_seed(seed)
    k = torch.arange(shape[1], dtype=torch.float64)
    amplitude = 2 / (1 + (k[:, None] ** 2 + k[None] ** 2)).sqrt()
    m = dct_matrix(shape[1])
    plain = m.T @ (torch.randn(count, *shape, generator=g, dtype=torch.float64) * amplitude) @ m
    mix = torch.tensor([[1.0, 0.6, 0.5], [0.2, 0.5, 0.1], [0.1, -0.2, 0.3]], dtype=torch.float64)
    return torch.einsum("kc,nkhw->nchw", mix, plain)


class GaussianModel:
    """The exact epsilon prediction for Gaussian data of a given spectrum: linear in x."""

    def __init__(self, spectrum: dq.SpectralSlope, schedule: dq.Schedule) -> None:
        self.basis, table = spectrum.basis(), spectrum.slope(schedule)
        self.rows = {int(t): table[i] for i, t in enumerate(schedule.timesteps)}

    def __call__(self, x, t):
        rows = self.basis.forward(x.flatten(1).double().clone())
        rows *= torch.stack([self.rows[int(k)] for k in t])
        return self.basis.inverse(rows).view_as(x).to(x.dtype)


@pytest.mark.parametrize("shape", [(3, 8, 8), (4, 5, 7), (2, 9), (6,), (1, 3, 4, 5)])
def test_basis_is_orthonormal(shape):
    channels = torch.linalg.qr(torch.randn(shape[0], shape[0], dtype=torch.float64)).Q
    basis, x = Basis(channels, shape), torch.randn(5, *shape, dtype=torch.float64).flatten(1)
    y = basis.forward(x.clone(), torch.empty_like(x))
    assert torch.allclose(y.norm(dim=1), x.norm(dim=1))
    assert torch.allclose(basis.inverse(y.clone()), x, atol=1e-12)
    expected = torch.einsum("kc,nc...->nk...", channels, x.view(-1, *shape))
    for axis in range(2, len(shape) + 1):
        expected = torch.movedim(torch.movedim(expected, axis, -1) @ dct_matrix(shape[axis - 1]).T, -1, axis)
    assert torch.allclose(y.view(-1, *shape), expected, atol=1e-12)


def test_fit_finds_the_spectrum():
    many, few = smooth_images(4000), smooth_images(16, seed=1)
    exact, rough = dq.SpectralSlope.fit(many), dq.SpectralSlope.fit(few)
    rows = exact.basis().forward(many.flatten(1).contiguous())
    assert (rows.var(0) / exact.variance.flatten()).log().abs().max() < 0.35  # rings average neighbours together
    covariance = torch.cov(exact.basis().forward(many.flatten(1).contiguous()).view(-1, 3, 256)[:, :, 1].T)
    assert (covariance - torch.diag(covariance.diagonal())).abs().max() < 0.1 * covariance.diagonal().max()
    assert (rough.variance.flatten(1)[:, :4].mean(1) / exact.variance.flatten(1)[:, :4].mean(1)).log().abs().max() < 1.0


def test_save_and_load(tmp_path):
    spectrum = dq.SpectralSlope.fit(smooth_images(10))
    spectrum.save(tmp_path / "spectrum.safetensors")
    again = dq.SpectralSlope.load(tmp_path / "spectrum.safetensors")
    assert torch.allclose(again.variance, spectrum.variance, rtol=1e-6)
    assert torch.allclose(again.channels, spectrum.channels)


def test_few_classes_of_slopes(ddim):
    """Tables are kept for classes of variances: fewer than there are rings in a large image, and slopes of predicted
    clean samples that differ by less than a hundredth."""
    rings = dq.SpectralSlope(torch.logspace(-4, 2, 3 * 4096, dtype=torch.float64).view(3, 64, 64), torch.eye(3))
    schedule = ddim(100)
    assert rings.classes(schedule)[0].shape[1] < 300
    spectrum = dq.SpectralSlope.fit(smooth_images(50))
    slopes, which = spectrum.classes(schedule)
    q, signal = schedule.denoised_coef()[:, 1:], schedule.signal[:-1, None]
    off = (slopes[:, which] - spectrum.slope(schedule)) * q * signal
    assert off.abs().max() < 1e-2


def test_gaussian_data_needs_two_rounds(ddim, noise, relative_error):
    """With the exact slope the first scan is the solution; the second round sees that it is."""
    spectrum, schedule = dq.SpectralSlope.fit(smooth_images(500)), ddim(100)
    model, start = GaussianModel(spectrum, schedule), noise(2, (3, 16, 16))
    before = start.clone()
    solver = dq.QuasiNewton(nodes=False)
    sampler = dq.DEQSampler(model, schedule, solver=solver, spectrum=spectrum, tol=1e-4)
    out = sampler.sample(start)
    assert out.stats.rounds <= 2
    assert relative_error(out.sample, sampler.serial(start).sample).max() < 1e-5
    assert torch.equal(start, before), "the caller's noise must not be transformed in place"
    solver = dq.QuasiNewton(slope="scalar", nodes=False)
    scalar = dq.DEQSampler(model, schedule, solver=solver, tol=1e-4).sample(start)
    assert scalar.stats.rounds > out.stats.rounds


@pytest.mark.parametrize(
    "spoil", [lambda v: torch.ones_like(v), lambda v: v.flip(1, 2), lambda v: 100 * v, lambda v: v / 100]
)
def test_a_wrong_spectrum_still_converges(mixture, ddim, noise, relative_error, spoil):
    good = dq.SpectralSlope.fit(smooth_images(50))
    wrong = dq.SpectralSlope(spoil(good.variance), good.channels)
    sampler = dq.DEQSampler(mixture((3, 16, 16)), ddim(50), solver="quasi-newton", spectrum=wrong, tol=1e-3)
    out, reference = sampler.sample(noise(2, (3, 16, 16))), sampler.serial(noise(2, (3, 16, 16)))
    assert out.converged.all()
    assert relative_error(out.sample, reference.sample).max() < 1e-3


def test_stochastic_windowed_and_previewed(mixture, ddim, noise, relative_error):
    spectrum, schedule = dq.SpectralSlope.fit(smooth_images(50)), ddim(40, eta=1.0)
    sampler = dq.DEQSampler(mixture((3, 16, 16)), schedule, spectrum=spectrum, tol=1e-4, window=15)
    previews, start = [], noise(2, (3, 16, 16))
    out = sampler.sample(
        start, generator=torch.Generator().manual_seed(1), return_trajectory=True,
        callback=lambda info: previews.append((info.preview(), info.sample())) and None,
    )  # fmt: skip
    reference = sampler.serial(start, generator=torch.Generator().manual_seed(1), return_trajectory=True)
    assert relative_error(out.sample, reference.sample).max() < 1e-4
    assert relative_error(out.trajectory.flatten(1, 2), reference.trajectory.flatten(1, 2)).max() < 1e-3
    assert relative_error(previews[-1][1], reference.sample).max() < 1e-4
    assert relative_error(previews[-1][0], reference.sample).max() < 0.2, "the last preview is close to the sample"
    warm = sampler.sample(start, generator=torch.Generator().manual_seed(1), init_trajectory=out.trajectory)
    assert warm.stats.rounds < out.stats.rounds


def test_bad_spectra(mixture, ddim, noise):
    good = dq.SpectralSlope.fit(smooth_images(5))
    with pytest.raises(ValueError, match="samples: expected at least 2"):
        dq.SpectralSlope.fit(torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match="variance: expected positive"):
        dq.SpectralSlope(-good.variance, good.channels)
    with pytest.raises(ValueError, match="channels: expected an orthonormal"):
        dq.SpectralSlope(good.variance, 2 * good.channels)
    with pytest.raises(ValueError, match="spectrum's shape"):
        dq.DEQSampler(mixture(), ddim(), spectrum=good).sample(noise(1))
    with pytest.raises(ValueError, match="needs DEQSampler"):
        dq.DEQSampler(mixture(), ddim(), solver=dq.QuasiNewton(slope="spectral"))
    with pytest.raises(TypeError, match="spectrum: expected"):
        dq.DEQSampler(mixture(), ddim(), spectrum=torch.ones(3))


def test_from_model(mixture, ddim):
    spectrum = dq.SpectralSlope.from_model(mixture(), ddim(10), (3, 8, 8), count=8)
    assert spectrum.shape == (3, 8, 8)
    assert bool((spectrum.variance > 0).all())
