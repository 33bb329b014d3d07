"""The temperature of a restoration: a factor of all noise that a chain begins with and draws."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import deqdiff_fast as dq
from deqdiff_fast.operators import Blur, Inpaint, Operator
from deqdiff_fast.restoration import DiffPIR

SHAPE = (3, 8, 8)
METHODS = ("ddnm", "ddrm", "diffpir", "pigdm")
ABAR = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def blur() -> Operator:
    kernel = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64)
    return Blur(torch.outer(kernel, kernel))


def measured(operator: Operator, sigma: float, dtype: torch.dtype = torch.float64) -> Tensor:
    y = operator.A(0.6 * torch.randn(2, *SHAPE, generator=generator(7), dtype=dtype))
    return y + sigma * torch.randn(y.shape, generator=generator(8), dtype=dtype)


def white(x: Tensor, t: Tensor) -> Tensor:
    """E[eps | x] of data of unit variance: linear in x."""
    return (1 - ABAR[t]).sqrt().to(x)[:, None, None, None] * x


@pytest.mark.parametrize("eta", [0.0, 0.85])
@pytest.mark.parametrize("sigma", [0.0, 0.3])
@pytest.mark.parametrize("method", METHODS)
def test_parallel_is_serial(
    mixture: Any, ddim: Any, relative_error: Any, method: str, sigma: float, eta: float
) -> None:
    operator = blur()
    y = measured(operator, sigma)
    settings = {"sigma": sigma, "method": method, "solver": "quasi-newton", "on_failure": "raise", "tol": 1e-4}
    restorer = dq.DEQRestorer(mixture(SHAPE), ddim(12, eta), operator, temperature=0.4, **settings)
    expected, got = (solve(y, generator=generator()) for solve in (restorer.serial, restorer.restore))
    assert float(relative_error(got.sample, expected.sample).max()) <= 1e-3
    usual = dq.DEQRestorer(mixture(SHAPE), ddim(12, eta), operator, temperature=1.0, **settings)
    assert float(relative_error(usual.serial(y, generator=generator()).sample, expected.sample).max()) > 1e-2


@pytest.mark.parametrize("sigma", [0.0, 0.3])
@pytest.mark.parametrize("method", METHODS)
def test_at_zero_nothing_is_random(mixture: Any, ddim: Any, method: str, sigma: float) -> None:
    operator = blur()
    y = measured(operator, sigma)
    restorer = dq.DEQRestorer(mixture(SHAPE), ddim(8, 0.85), operator, sigma=sigma, method=method, temperature=0.0)
    for solve in (restorer.serial, restorer.restore):
        assert torch.equal(*(solve(y, generator=generator(seed)).sample for seed in (1, 2)))


@pytest.mark.parametrize("eta", [0.0, 0.85])
@pytest.mark.parametrize("sigma", [0.0, 0.3])
@pytest.mark.parametrize("method", METHODS)
def test_of_a_linear_chain_it_is_the_distance_from_the_mean(ddim: Any, method: str, sigma: float, eta: float) -> None:
    """Whatever of the noise were left out of it would show."""
    operator = blur()
    y = measured(operator, sigma)

    def sample(temperature: float) -> Tensor:
        restorer = dq.DEQRestorer(white, ddim(8, eta), operator, sigma=sigma, method=method, temperature=temperature)
        return restorer.serial(y, generator=generator()).sample

    mean, whole = sample(0.0), sample(1.0)
    assert float((whole - mean).abs().max()) > 1e-3
    assert torch.allclose(sample(0.3), mean + 0.3 * (whole - mean), atol=1e-6)
    assert torch.allclose(sample(1.5), mean + 1.5 * (whole - mean), atol=1e-6)


def test_noise_that_is_given_is_scaled_too(mixture: Any, ddim: Any) -> None:
    operator, noise = blur(), torch.randn(2, *SHAPE, generator=generator(1), dtype=torch.float64)
    y = measured(operator, 0.3)
    half, whole = (
        dq.DEQRestorer(mixture(SHAPE), ddim(8), operator, sigma=0.3, method=DiffPIR(), temperature=temperature)
        for temperature in (0.5, 1.0)
    )
    assert torch.allclose(half.serial(y, noise=noise).sample, whole.serial(y, noise=0.5 * noise).sample, atol=1e-9)


def test_fitted_noise_is_that_of_the_restoration(mixture: Any, ddim: Any) -> None:
    operator = Inpaint(torch.rand(8, 8, generator=generator(1)) < 0.5)
    y = measured(operator, 0.0, torch.float32)

    def loss(sample: Tensor) -> Tensor:
        return sample.square().flatten(1).mean(1)

    restorer = dq.DEQRestorer(mixture(SHAPE), ddim(8, 0.5), operator, solver="quasi-newton", temperature=0.5)
    first = restorer.serial(y, generator=generator()).sample
    fitted = restorer.fit_noise(y, loss, generator=generator(), steps=4, lr=0.2)
    assert torch.allclose(fitted.losses[0], loss(first).double(), rtol=1e-2)  # not scaled twice
    assert torch.allclose(loss(fitted.restoration.sample).double(), fitted.losses.amin(0), rtol=0.05)
    still = dq.DEQRestorer(mixture(SHAPE), ddim(8, 0.5), operator, temperature=0.0)
    with pytest.raises(ValueError, match="temperature: expected one > 0 to fit noise"):
        still.fit_noise(y, loss)


@pytest.mark.parametrize("temperature", [-0.1, float("nan"), float("inf"), None, "cold", True])
def test_bad_values_are_named(mixture: Any, ddim: Any, temperature: Any) -> None:
    with pytest.raises(ValueError, match="temperature: expected a finite number >= 0"):
        dq.DEQRestorer(mixture(SHAPE), ddim(8), blur(), temperature=temperature)
