"""Gradient modes at their limits: memory, failures, warnings and bad settings."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import deqdiff_fast as dq


@pytest.mark.parametrize("mode", ["implicit", "reversible", "unrolled"])
def test_memory_against_the_number_of_rounds(ddim, peak_bytes, mode):
    """That of implicit and reversible does not grow with the rounds (but for two anchors); unrolled shows that the
    measurement would see it."""
    schedule = ddim(24)
    body = nn.Sequential(nn.Linear(64, 512), nn.Tanh(), nn.Linear(512, 64)).double()

    def model(x, t):
        return 0.5 * x + 0.1 * body(x)

    model.parameters = lambda: list(body.parameters())
    start = torch.randn(2, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    peaks = []
    for count in (3, 15):
        sampler = dq.DEQSampler(
            model, schedule, solver="picard", tol=1e-13, max_rounds=count, gradient=mode, on_failure="warn"
        )
        with warnings.catch_warnings(), peak_bytes() as memory:
            warnings.simplefilter("ignore", dq.ConvergenceWarning)
            out = sampler.sample(start)
            out.sample.square().sum().backward()
        assert out.stats.rounds == count
        peaks.append(memory.peak)
    grown, row = peaks[1] - peaks[0], 2 * 8  # bytes of one number for all samples
    if mode == "unrolled":
        assert grown >= 12 * 24 * 512 * row  # the activations alone, of twelve rounds
    else:
        anchors = 2 * 2 * 25 * 64 * row if mode == "reversible" else 0
        assert grown <= 0.01 * peaks[0] + anchors


@pytest.mark.parametrize("mode", ["unrolled", "reversible"])
def test_modes_with_their_own_rounds_fail_as_they_are_told(ddim, mode, bent, backpropagation, apart):
    schedule, model = ddim(12), bent()
    start = torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)

    def sampler(**settings):
        return dq.DEQSampler(model, schedule, tol=1e-9, max_rounds=2, gradient=mode, **settings)

    with pytest.raises(dq.NotConvergedError, match="did not converge in 2 rounds") as caught:
        sampler(on_failure="raise").sample(start)
    assert not caught.value.solution.converged.any()
    with pytest.warns(dq.ConvergenceWarning, match="implicit"):
        out = sampler(on_failure="warn").sample(start)
    assert not out.converged.any()
    assert out.stats.residual_trace.shape == (2, 2)
    assert torch.autograd.grad(out.sample.sum(), start)[0].isfinite().all()
    out = sampler().sample(start)
    assert out.converged.all()
    assert out.stats.finished_serially == 12
    expected = backpropagation(model, schedule, start)
    assert torch.allclose(out.sample, expected, rtol=1e-12)
    got = torch.autograd.grad(out.sample.pow(3).sum(), start)
    assert apart(got[0], torch.autograd.grad(expected.pow(3).sum(), start)[0])[0] <= 1e-6


@pytest.mark.parametrize("mode", ["unrolled", "reversible"])
def test_a_callback_sees_and_stops_their_rounds(ddim, mode, bent):
    model, schedule, seen = bent(), ddim(12), []
    start = torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)

    def record(info):
        seen.append((info.round, float(info.residual.max())))
        assert info.preview().shape == info.sample().shape == start.shape
        return info.round == 3

    out = dq.DEQSampler(model, schedule, solver="quasi-newton", tol=1e-12, gradient=mode).sample(start, callback=record)
    assert [number for number, _ in seen] == [1, 2, 3]
    assert seen[-1][1] < seen[0][1]
    assert out.stats.stop_reason == "callback"
    assert not out.converged.any()


def test_a_model_that_breaks_is_named(ddim):
    def model(x, t):
        return x / (t[:, None] != 0) * 0 + x

    start = torch.randn(1, 6, dtype=torch.float64, requires_grad=True)
    for mode in ("unrolled", "reversible"):
        with pytest.raises(dq.NonFiniteError, match="timestep 0"):
            dq.DEQSampler(model, ddim(10), solver="quasi-newton", gradient=mode).sample(start)


def test_a_reversal_that_loses_its_way_says_so(ddim, monkeypatch, bent):
    """Rounding of a float32 model, amplified a billion times because no anchor is kept."""
    from deqdiff_fast.gradient import reversible

    monkeypatch.setattr(reversible, "GROWTH", 1e15)
    monkeypatch.setattr(reversible, "MISSED", 1e-9)
    model = bent().float()
    start = torch.randn(2, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    out = dq.DEQSampler(model, ddim(12), solver="quasi-newton", tol=1e-6, gradient="reversible").sample(start)
    with pytest.warns(dq.ConvergenceWarning, match="missed its start"):
        out.sample.sum().backward()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: dq.Implicit(tol=0), ValueError, "tol"),
        (lambda: dq.Implicit(tol="1e-3"), ValueError, "tol"),
        (lambda: dq.Phantom(tau=0), ValueError, "tau"),
        (lambda: dq.Phantom(tau=1.5), ValueError, "tau"),
        (lambda: dq.Phantom(tau=True), ValueError, "tau"),
        (lambda: dq.Phantom(steps=0), ValueError, "steps"),
        (lambda: dq.Phantom(steps=1.0), ValueError, "steps"),
        (lambda: dq.Phantom(taus=1), TypeError, "taus"),
        (lambda: dq.Reversible(1), ValueError, "relaxation"),
        (lambda: dq.Reversible(2.0), ValueError, "relaxation"),
        (lambda: dq.Reversible("0.5"), ValueError, "relaxation"),
    ],
)
def test_bad_settings(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_bad_modes(ddim, bent):
    with pytest.raises(ValueError, match="'implicit', 'phantom', 'unrolled', 'reversible'"):
        dq.DEQSampler(bent(), ddim(5), gradient="exact")
    for mode in (None, 3, dq.Phantom):
        with pytest.raises(TypeError, match="gradient"):
            dq.DEQSampler(bent(), ddim(5), solver="quasi-newton", gradient=mode)


def test_second_derivatives_are_refused(ddim, bent):
    start = torch.randn(1, 6, dtype=torch.float64, requires_grad=True)
    for mode in ("implicit", "reversible"):
        out = dq.DEQSampler(bent(), ddim(5), solver="quasi-newton", gradient=mode).sample(start)
        (first,) = torch.autograd.grad(out.sample.pow(2).sum(), start, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            first.sum().backward()


@pytest.mark.parametrize("mode", ["implicit", "phantom", "reversible"])
def test_second_derivatives_with_respect_to_some_inputs_are_no_zeros(ddim, bent, mode):
    """With torch's own `once_differentiable` nobody asks the refusal: jvp, hvp and vhp were zero."""
    start = torch.randn(1, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sampler = dq.DEQSampler(bent(), ddim(5), solver="quasi-newton", gradient=mode)
    for of in (torch.autograd.functional.hvp, torch.autograd.functional.vhp):
        with pytest.raises(RuntimeError, match="use gradient='unrolled'"):
            of(lambda x: sampler.sample(x).sample.square().sum(), start, start)
    with pytest.raises(RuntimeError, match="use gradient='unrolled'"):
        torch.autograd.functional.jvp(lambda x: sampler.sample(x).sample, start, start)
    leaf = start.clone().requires_grad_()
    (first,) = torch.autograd.grad(sampler.sample(leaf).sample.sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.autograd.grad(first.sum() + leaf.sum(), leaf)
