"""The norm in which errors are meant: entries that nobody reads, entries that alone are wanted, and what is refused."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from solvers import SOLVERS

import deqdiff_fast as dq
from deqdiff_fast.model.weighted_norm import SMALLEST, Weight

ABAR = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
READ, PADDING = 48, 16


def padded(mixture, rough=True):
    """A model of 48 entries beside 16 that it never reads, whose own predictions are large, and not smooth if rough."""
    inner = mixture((READ,))

    def model(x, t):
        noise = (1 - ABAR[t]).sqrt()[:, None].to(x)
        clean = 100 * torch.sin(3 * x[:, READ:]) + 50 if rough else 200
        other = (x[:, READ:] - ABAR[t].sqrt()[:, None].to(x) * clean) / noise
        return torch.cat([inner(x[:, :READ], t), other], dim=1)

    return model


@pytest.fixture
def weight():
    return torch.cat([torch.ones(READ), torch.zeros(PADDING)])


@pytest.mark.parametrize(("steps", "eta"), [(20, 0.5), (50, 0.0)])
@pytest.mark.parametrize("case", [case for case in SOLVERS if not case.slow], ids=str)
def test_entries_that_nobody_reads_do_not_count(mixture, ddim, noise, relative_error, weight, case, steps, eta):
    model, start = padded(mixture), noise(3, (READ + PADDING,))
    sampler = case.sampler(model, ddim(steps, eta), weight=weight)
    draw = lambda: torch.Generator().manual_seed(1)  # noqa: E731
    out, wanted = sampler.sample(start, generator=draw()), sampler.serial(start, generator=draw())
    assert out.converged.all()
    assert relative_error(out.sample[:, :READ], wanted.sample[:, :READ]).max() <= 1e-2
    assert out.sample.isfinite().all()


def test_without_a_weight_large_entries_hide_the_others(mixture, ddim, noise, relative_error, weight):
    model, start = padded(mixture, rough=False), noise(4, (READ + PADDING,))
    errors = {}
    for given in (None, weight):
        sampler = dq.DEQSampler(model, ddim(100), solver="triangular", weight=given)
        out, wanted = sampler.sample(start), sampler.serial(start)
        errors[given is None] = relative_error(out.sample[:, :READ], wanted.sample[:, :READ]).max()
    assert errors[False] <= 1e-2
    assert errors[True] > 10 * errors[False]


@pytest.mark.parametrize("steps", [20, 100])
def test_equal_weights_change_nothing(mixture, ddim, noise, steps):
    start = noise(2, (30,), dtype=torch.float64)
    plain, weighted = (
        dq.DEQSampler(mixture((30,)), ddim(steps), solver="quasi-newton", weight=weight).sample(start)
        for weight in (None, torch.full((30,), 7.0))
    )
    assert weighted.stats.rounds == plain.stats.rounds
    torch.testing.assert_close(weighted.sample, plain.sample, rtol=1e-9, atol=1e-9)


def test_the_masked_part_of_a_series_is_what_counts(ddim, noise, relative_error):
    """Imputation: what was observed is known, and large; the missing values are asked for."""
    draw = torch.Generator().manual_seed(3)
    series = torch.cat([torch.randn(1, 64, generator=draw).cumsum(1) for _ in range(2)])
    missing = torch.zeros(64, dtype=torch.bool)
    missing[20:34] = True
    series[:, ~missing] *= 40
    kernel = torch.exp(-(torch.arange(64)[:, None] - torch.arange(64)).abs() / 8.0)

    def model(x, t, observed):
        signal, sigma = ABAR[t].sqrt()[:, None].to(x), (1 - ABAR[t]).sqrt()[:, None].to(x)
        smooth = torch.tanh((x / (signal.square() + sigma.square()).sqrt()) @ kernel / 4) * 2
        clean = torch.where(missing, smooth, observed)
        return (x - signal * clean) / sigma

    sampler = dq.DEQSampler(model, ddim(100), solver="quasi-newton", weight=missing.float())
    out = sampler.sample(noise(2, (64,)), model_kwargs={"observed": series})
    wanted = sampler.serial(noise(2, (64,)), model_kwargs={"observed": series})
    assert out.converged.all()
    assert relative_error(out.sample[:, missing], wanted.sample[:, missing]).max() <= 1e-2
    assert (out.stats.error_estimate <= 1e-2).all()


@pytest.mark.parametrize("method", ["equilibrium", "fixed_point"])
def test_an_inversion_is_judged_by_the_entries_that_count(mixture, ddim, noise, relative_error, weight, method):
    model, schedule = mixture((READ + PADDING,)), ddim(20)
    image = dq.DEQSampler(model, schedule).serial(noise(2, (READ + PADDING,))).sample
    image[:, READ:] *= 3
    inverter = dq.DEQInverter(model, schedule, method, weight=weight, tol=1e-3)
    found = inverter.invert(image)
    assert found.converged.all()
    measured = relative_error(found.reconstruction[:, :READ], image[:, :READ])
    torch.testing.assert_close(found.error, measured, rtol=1e-2, atol=1e-6)


def test_a_descent_minimises_the_weighted_error(mixture, ddim, noise, weight):
    model, schedule = mixture((READ + PADDING,)), ddim(10)
    image = dq.DEQSampler(model, schedule).serial(noise(1, (READ + PADDING,))).sample
    image[:, READ:] += 0.7  # no chain of this model ends there
    found = dq.DEQInverter(model, schedule, "gradient", weight=weight, tol=5e-2, steps=100).invert(image)
    assert found.converged.all()


def test_gradients_pass_through_a_weighted_solve(bent, ddim, noise, backpropagation, apart):
    model, schedule = bent(), ddim(12)
    start = noise(2, (6,), dtype=torch.float64).requires_grad_()
    weight = torch.tensor([1.0, 1.0, 4.0, 0.25, 1.0, 2.0])
    sampler = dq.DEQSampler(model, schedule, solver="quasi-newton", tol=1e-8, weight=weight)
    got = torch.autograd.grad(sampler.sample(start).sample.sum(), start)[0]
    wanted = torch.autograd.grad(backpropagation(model, schedule, start).sum(), start)[0]
    assert apart(got, wanted)[0] < 1e-3


def test_a_norm_that_was_first_used_under_inference_mode_has_gradients(weight):
    with torch.inference_mode():
        norm = Weight(weight).on((READ + PADDING,))
        norm.inverse(torch.ones(1, READ + PADDING))
    rows = torch.ones(1, READ + PADDING, requires_grad=True)
    (2 * norm.forward(1 * rows)).sum().backward()
    torch.testing.assert_close(rows.grad[0, :READ], torch.full((READ,), 2.0))


def test_a_norm_that_a_few_entries_make_is_told_once(mixture, ddim, noise, caplog, weight):
    model, start = padded(mixture), noise(2, (READ + PADDING,))

    def dominated(x, t):
        out = model(x, t)
        clean = 2e4
        out[:, -1] = (x[:, -1] - ABAR[t].sqrt().to(x) * clean) / (1 - ABAR[t]).sqrt().to(x)
        return out

    sampler = dq.DEQSampler(dominated, ddim(20), solver="quasi-newton")
    with caplog.at_level(logging.WARNING, "deqdiff_fast"):
        sampler.sample(start), sampler.sample(start)
    told = [record for record in caplog.records if "weight=" in record.getMessage()]
    assert len(told) == 1
    assert told[0].getMessage().startswith("1 of the 64 entries")
    caplog.clear()
    dq.DEQSampler(dominated, ddim(20), solver="quasi-newton", weight=weight).sample(start)
    dq.DEQSampler(mixture((64,)), ddim(20), solver="quasi-newton").sample(start)
    assert not [record for record in caplog.records if "weight=" in record.getMessage()]


def test_smooth_pictures_are_no_reason_to_warn(ddim, caplog):
    """Few coefficients of a spectrum make nearly all of their norm; few pixels do not."""
    axis = torch.linspace(0, 3, 16)
    picture = (axis.sin()[:, None] + axis.cos() + 2).expand(3, 16, 16)

    def model(x, t):
        signal = ABAR[t].sqrt()[:, None, None, None].to(x)
        return (x - signal * picture) / (1 - ABAR[t]).sqrt()[:, None, None, None].to(x)

    spectrum = dq.SpectralSlope.fit(picture + 0.1 * torch.randn(16, 3, 16, 16))
    with caplog.at_level(logging.WARNING, "deqdiff_fast"):
        for given in (spectrum, None):
            dq.DEQSampler(model, ddim(20), solver="quasi-newton", spectrum=given).sample(torch.randn(1, 3, 16, 16))
    assert not [record for record in caplog.records if "weight=" in record.getMessage()]


@pytest.mark.parametrize(
    ("weight", "error", "match"),
    [
        (torch.ones(5), ValueError, r"weight: expected a shape that can be broadcast to a sample of shape \(3, 8, 8\)"),
        (torch.ones(2, 3, 8, 8), ValueError, "broadcast"),
        (-torch.ones(8), ValueError, ">= 0"),
        (torch.zeros(8), ValueError, "positive"),
        (torch.full((8,), float("nan")), ValueError, "finite"),
        ("mask", TypeError, "expected a tensor"),
    ],
)
def test_bad_weights(mixture, ddim, noise, weight, error, match):
    with pytest.raises(error, match=match):
        dq.DEQSampler(mixture(), ddim(10), weight=weight).sample(noise())
    with pytest.raises(error, match=match):
        dq.DEQInverter(mixture(), ddim(10), weight=weight).invert(noise())


def test_a_spectrum_beside_a_weight_is_refused(mixture, ddim):
    spectrum = dq.SpectralSlope.fit(torch.randn(8, 3, 8, 8))
    with pytest.raises(ValueError, match="weight: a spectrum"):
        dq.DEQSampler(mixture(), ddim(10), weight=torch.ones(8), spectrum=spectrum)
    with pytest.raises(ValueError, match="weight: a spectrum"):
        dq.DEQInverter(mixture(), ddim(10), weight=torch.ones(8), spectrum=spectrum)


def test_arrays_and_masks_are_weights_and_zeros_can_be_found_again():
    norm = Weight(np.array([True, False, True])).on((2, 3))
    rows = torch.randn(4, 6, dtype=torch.float64)
    torch.testing.assert_close(norm.inverse(norm.forward(rows.clone())), rows)
    assert norm.scale.tolist() == [1, SMALLEST, 1] * 2
