"""Gradients of restorations, in every mode and by every operator, and in a norm with weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from operator_cases import CASES
from torch import Tensor

import deqdiff_fast as dq

SHAPE = (3, 8, 8)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("gradient", ["implicit", "unrolled", "reversible"])
@pytest.mark.parametrize(("name", "sigma"), [("inpaint", 0.0), ("inpaint", 0.2), ("average, mask", 0.0)])
def test_are_those_of_the_serial_chain(mixture: Any, ddim: Any, name: str, sigma: float, gradient: str) -> None:
    """Where the singular vectors are the pixels themselves, and where there are none, too."""
    operator, shape = CASES[name].make(), CASES[name].shape
    y, noise, direction, step = (
        0.6 * torch.randn(shape, generator=generator(k), dtype=torch.float64) for k in range(4)
    )  # fmt: skip
    y, back = operator.A(y).requires_grad_(), operator.A(step)
    restorer = dq.DEQRestorer(
        mixture(shape[1:]), ddim(6, 0.5), operator, sigma=sigma, gradient=gradient, tol=1e-9, solver="picard"
    )
    got = restorer.restore(y, noise=(1.0 * noise).requires_grad_(), generator=generator())
    assert bool(got.converged.all())
    assert got.stats.error_estimate.shape == (shape[0],)
    (found,) = torch.autograd.grad((got.sample * direction).sum(), y)
    with torch.no_grad():
        moved = [restorer.serial(y + h * back, noise=noise, generator=generator()).sample for h in (1e-5, -1e-5)]
    expected = float(((moved[0] - moved[1]) * direction).sum() / 2e-5)
    assert float((found * back).sum()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("gradient", ["implicit", "phantom"])
def test_noise_is_fitted_where_the_singular_vectors_are_the_pixels(mixture: Any, ddim: Any, gradient: str) -> None:
    mask = torch.rand(8, 8, generator=generator(1)) < 0.5
    restorer = dq.DEQRestorer(mixture(SHAPE), ddim(8), dq.operators.Inpaint(mask), sigma=0.1, gradient=gradient)
    y = 0.3 * torch.randn(2, *SHAPE, generator=generator()) * mask
    fitted = restorer.fit_noise(y, lambda x: x.square().flatten(1).sum(1), generator=generator(), steps=2)
    assert bool((fitted.losses[1] != fitted.losses[0]).all())
    with pytest.raises(ValueError, match="loss: expected one with a gradient"):
        restorer.fit_noise(y, lambda x: x.detach().square().sum(), steps=2)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="fit_noise: expected torch"):
        restorer.fit_noise(y, lambda x: x.sum(), steps=2)


def test_a_norm_with_weights(mixture: Any, ddim: Any) -> None:
    """No spectrum is used then, neither the prior one."""
    weight, operator = torch.rand(8, 8, generator=generator(1)), dq.operators.Blur.gaussian(1.0)
    y: Tensor = operator.A(0.5 * torch.randn(2, *SHAPE, generator=generator(2)))
    restorer = dq.DEQRestorer(mixture(SHAPE), ddim(20), operator, weight=weight)
    found, expected = (solve(y, generator=generator()).sample for solve in (restorer.restore, restorer.serial))
    off = ((found - expected).square() * weight).sum() / (expected.square() * weight).sum()
    assert float(off.sqrt()) < 1e-2


def test_keyword_arguments_of_any_name_reach_the_model_or_are_refused(mixture: Any, ddim: Any) -> None:
    operator, told = dq.operators.Downsample(2), set[str]()

    def model(x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        told.update(kwargs)
        return mixture(SHAPE)(x, t)

    restorer, y = dq.DEQRestorer(model, ddim(4), operator), torch.zeros(2, 3, 4, 4)
    restorer.restore(y, {"inputs": 1.0, "sample": 2.0})
    assert told == {"inputs", "sample"}
    with pytest.raises(ValueError, match="model_kwargs: 'step' is a name that the restorer needs itself"):
        restorer.restore(y, {"step": 3.0})
