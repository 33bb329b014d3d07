"""The implicit gradient is that of back-propagation through the serial chain."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import deqdiff_fast as dq


class Net(nn.Module):
    """A small smooth network in float64, with a conditioning vector."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Linear(9, 24), nn.Linear(24, 8)
        self.double()

    def forward(self, x, t, cond=None):
        h = torch.cat([x, t[:, None].to(x.dtype) / 1000], dim=1)
        h = torch.tanh(self.inner(h if cond is None else h + torch.nn.functional.pad(cond, (0, 1))))
        return 0.7 * x + 0.5 * self.outer(h)


SIGMAS = [*torch.linspace(3, 0.1, 20, dtype=torch.float64).tolist(), 0.0]


@pytest.mark.parametrize("kind", ["ddim", "multistep", "euler"])
@pytest.mark.parametrize("solver", ["auto", "picard", "quasi-newton"])
def test_matches_backpropagation(ddim, backpropagation, kind, solver):
    schedule = {
        "ddim": lambda: ddim(20),
        "multistep": lambda: dq.Schedule.from_sigmas(SIGMAS, "dpmpp_2m", prediction_type="epsilon"),
        "euler": lambda: dq.Schedule.from_sigmas(SIGMAS, "euler", prediction_type="epsilon"),
    }[kind]()
    model, draw = Net(), torch.Generator().manual_seed(1)
    noise = torch.randn(3, 8, generator=draw, dtype=torch.float64, requires_grad=True)
    cond = torch.randn(3, 8, generator=draw, dtype=torch.float64, requires_grad=True)
    target = torch.randn(3, 8, generator=draw, dtype=torch.float64)
    leaves = [noise, cond, *model.parameters()]
    expected = torch.autograd.grad(
        (backpropagation(model, schedule, noise, cond=cond) - target).square().mean(), leaves
    )
    out = dq.DEQSampler(model, schedule, solver=solver, tol=1e-9).sample(noise, {"cond": cond})
    got = torch.autograd.grad((out.sample - target).square().mean(), leaves)
    for a, b in zip(got, expected):
        assert (a - b).norm() <= 1e-6 * b.norm()
        assert torch.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.999999


def test_only_what_is_asked_for_gets_a_gradient(ddim):
    model, noise = Net().requires_grad_(False), torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    out = dq.DEQSampler(model, ddim(10), solver="quasi-newton", tol=1e-6).sample(noise)
    out.sample.sum().backward()
    assert noise.grad is not None
    assert noise.grad.norm() > 0
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        assert not dq.DEQSampler(model, ddim(10), solver="quasi-newton").sample(noise).sample.requires_grad
    assert not dq.DEQSampler(model, ddim(10), solver="quasi-newton").sample(noise.detach()).sample.requires_grad


def test_solvers_of_fixed_shape_or_few_rounds_have_gradients_too(ddim):
    model = Net().requires_grad_(False)
    spectrum = dq.SpectralSlope.fit(torch.randn(20, 8, generator=torch.Generator().manual_seed(0)))
    noise = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    grads = []
    for solver in ("picard", dq.QuasiNewton(slope=spectrum), dq.QuasiNewton(slope=None), "deq-ddim"):
        sampler = dq.DEQSampler(model, ddim(10), solver=solver, tol=1e-8)
        grads += torch.autograd.grad(sampler.sample(noise).sample.square().sum(), noise)
    assert all(torch.allclose(g, grads[0], rtol=1e-5) for g in grads)


def test_gradient_of_a_stochastic_chain(ddim):
    model, schedule = Net().requires_grad_(False), ddim(20, eta=1.0)
    noise = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)

    def loss(x):
        sampler = dq.DEQSampler(model, schedule, solver="quasi-newton", tol=1e-10)
        return sampler.sample(x, generator=torch.Generator().manual_seed(2)).sample.square().sum()

    (got,) = torch.autograd.grad(loss(noise), noise)
    way = torch.randn(2, 8, dtype=torch.float64)
    with torch.no_grad():
        slope = (loss(noise + 1e-5 * way) - loss(noise - 1e-5 * way)) / 2e-5
    assert torch.isclose((got * way).sum(), slope, rtol=1e-5)


@pytest.mark.parametrize("gradient", [dq.Implicit(), dq.Phantom(tau=1.0, steps=11), "reversible"])
@pytest.mark.parametrize("case", ["the same", "made of the other", "made of a parameter"])
def test_conditions_that_are_made_of_each_other(ddim, backpropagation, gradient, case):
    """Each has a gradient of its own: what one is made of got the other's twice, or a graph was gone."""
    net, cond = Net(), torch.randn(2, 8, dtype=torch.float64, requires_grad=True)

    def model(x, t, a, b):
        return net(x, t, a + torch.sin(x) * b)

    def conditions():
        made = {"the same": cond, "made of the other": cond.square(), "made of a parameter": net.outer.bias + 0 * cond}
        return {"a": cond, "b": made[case]}

    wrapped, noise = nn.Module(), torch.randn(2, 8, dtype=torch.float64)
    wrapped.net, wrapped.forward = net, model
    leaves = [cond, *net.parameters()]
    out = dq.DEQSampler(wrapped, ddim(10), solver="picard", tol=1e-9, gradient=gradient).sample(noise, conditions())
    got = torch.autograd.grad(out.sample.square().sum(), leaves)
    expected = torch.autograd.grad(backpropagation(model, ddim(10), noise, **conditions()).square().sum(), leaves)
    for a, b in zip(got, expected):
        assert (a - b).norm() <= 1e-6 * b.norm()
