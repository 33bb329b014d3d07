"""Every gradient of an implicit layer against back-propagation through 300 steps in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import deqdiff_fast as dq
from deqdiff_fast.equilibrium import AndersonSolver, RelaxedSolver, ReversibleSolver

STEPS = 300


def encoded(module, x):
    """An input that is no leaf: the gradient has to go on behind it."""
    encoder = nn.Linear(module.shape[-1], module.shape[-1])
    with torch.random.fork_rng():
        torch.manual_seed(5)
        nn.init.normal_(encoder.weight, std=module.shape[-1] ** -0.5)
        nn.init.normal_(encoder.bias)
    return encoder.to(x.dtype), encoder.to(x.dtype)(x)


def gradients(z, target, leaves):
    loss = (z - target).square().sum()
    return [g.double() for g in torch.autograd.grad(loss, leaves)]


def reference(module, x, target):
    wide, x = copy.deepcopy(module).double(), x.double().requires_grad_()
    encoder, injected = encoded(module, x)
    z = torch.zeros_like(x)
    for _ in range(STEPS):
        z = wide(z, injected)
    return z.detach(), gradients(z, target.double(), [x, *encoder.parameters(), *wide.parameters()])


def computed(module, x, target, **settings):
    x = x.clone().requires_grad_()
    encoder, injected = encoded(module, x)
    z, info = dq.equilibrium(lambda z: module(z, injected), torch.zeros_like(x), **settings)
    return z.detach(), gradients(z, target, [x, *encoder.parameters(), *module.parameters()]), info


def apart(got, expected):
    a, b = (torch.cat([g.flatten() for g in side]) for side in (got, expected))
    return float((a - b).norm() / b.norm())


EXACT = [
    ("anderson", "implicit"), ("relaxed", "implicit"), ("reversible", "implicit"), ("reversible", "reversible"),
    ("anderson", "unrolled"), ("relaxed", "unrolled"), (RelaxedSolver(damping=0.7), "implicit"),
    (AndersonSolver(history=3, damping=0.8), "implicit"), (ReversibleSolver(relaxation=0.6), "reversible"),
]  # fmt: skip


@pytest.mark.parametrize(("solver", "gradient"), EXACT, ids=lambda value: str(value)[:40])
def test_exact_gradients(layer, solver, gradient):
    module, x = layer
    target = torch.ones_like(x)
    z, expected = reference(module, x, target)
    found, got, info = computed(module, x, target, solver=solver, gradient=gradient, tol=1e-5, max_steps=100)
    assert bool(info.converged.all())
    assert float((found - z).norm() / z.norm()) < 1e-4
    assert apart(got, expected) < 1e-3
    for one, other in zip(got, expected, strict=True):
        assert apart([one], [other]) < 5e-3
    assert (info.adjoint is not None) == (gradient == "implicit")
    if info.adjoint is not None:
        assert bool(info.adjoint.converged.all())


def test_phantom_is_a_sum_of_a_few_terms(layer):
    """tau = 1 with enough steps is exact; one step is tau times the gradient of f alone."""
    module, x = layer
    target = torch.ones_like(x)
    _, expected = reference(module, x, target)
    _, got, _ = computed(module, x, target, gradient=dq.Phantom(tau=1.0, steps=60), tol=1e-6, max_steps=100)
    assert apart(got, expected) < 1e-3
    z, got, _ = computed(module, x, target, gradient=dq.Phantom(tau=0.25), tol=1e-6, max_steps=100)
    leaf = x.clone().requires_grad_()
    encoder, injected = encoded(module, leaf)
    single = gradients(module(z, injected), target, [leaf, *encoder.parameters(), *module.parameters()])
    assert apart(got, [0.25 * g for g in single]) < 1e-4


def test_backward_fills_grad_of_leaves(layer):
    module, x = layer
    for gradient in ("implicit", "reversible"):
        module.zero_grad()
        z, _ = dq.equilibrium(lambda z: module(z, x), torch.zeros_like(x), gradient=gradient, tol=1e-6, max_steps=100)
        expected = torch.autograd.grad(z.square().sum(), list(module.parameters()), retain_graph=True)
        z.square().sum().backward()
        for parameter, grad in zip(module.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, grad)


def test_the_result_is_the_same_with_and_without_a_gradient(layer):
    module, x = layer
    for gradient in ("implicit", "phantom", "unrolled", "reversible"):
        settings = {"gradient": gradient, "tol": 1e-5, "max_steps": 100}
        z, info = dq.equilibrium(lambda z: module(z, x), torch.zeros_like(x), **settings)
        with torch.no_grad():
            again, other = dq.equilibrium(lambda z: module(z, x), torch.zeros_like(x), **settings)
        assert z.requires_grad
        assert not again.requires_grad
        torch.testing.assert_close(z.detach(), again, rtol=1e-6, atol=1e-6)
        assert info.steps.tolist() == other.steps.tolist()


def test_a_retained_graph_can_be_gone_through_again(layer):
    module, x = layer
    for gradient in ("implicit", "reversible"):
        z, _ = dq.equilibrium(lambda z: module(z, x), torch.zeros_like(x), gradient=gradient, tol=1e-5, max_steps=100)
        parameters = list(module.parameters())
        first = torch.autograd.grad(z.square().sum(), parameters, retain_graph=True)
        second = torch.autograd.grad(z.square().sum(), parameters)
        for one, other in zip(first, second, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("gradient", ["implicit", "phantom", "reversible"])
def test_second_derivatives_are_refused(layer, gradient):
    module, x = layer
    z, _ = dq.equilibrium(lambda z: module(z, x), torch.zeros_like(x), gradient=gradient, max_steps=100)
    with pytest.raises(RuntimeError, match="unrolled"):
        torch.autograd.grad(z.square().sum(), list(module.parameters()), create_graph=True)


def test_second_derivatives_of_the_unrolled_solve():
    w = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    z, _ = dq.equilibrium(
        lambda z: w * z + 1, torch.zeros(1, 1, dtype=torch.float64), solver="relaxed", gradient="unrolled", tol=1e-12
    )
    (first,) = torch.autograd.grad(z.sum(), w, create_graph=True)  # z = 1 / (1 - w)
    (second,) = torch.autograd.grad(first, w)
    assert float(first.detach()) == pytest.approx(4, rel=1e-6)
    assert float(second.detach()) == pytest.approx(16, rel=1e-6)


def test_a_parameter_changed_in_between_is_noticed(layer):
    module, x = layer
    for gradient in ("implicit", "reversible"):
        z, _ = dq.equilibrium(lambda z: module(z, x), torch.zeros_like(x), gradient=gradient, max_steps=100)
        with torch.no_grad():
            for p in module.parameters():
                p.mul_(0.9)
        with pytest.raises(RuntimeError, match=r"in.?place"):
            z.square().sum().backward()


def test_autocast_reaches_the_way_back():
    torch.manual_seed(0)
    module = nn.Linear(16, 16)
    x = torch.randn(3, 16)
    expected = {}
    for gradient in ("implicit", "reversible"):
        with torch.autocast("cpu", torch.bfloat16):
            z, info = dq.equilibrium(
                lambda z: torch.tanh(0.5 * module(z) + x), torch.zeros(3, 16), gradient=gradient, tol=3e-2
            )
        assert bool(info.converged.all())
        assert z.dtype == torch.float32
        expected[gradient] = torch.autograd.grad(z.square().sum(), module.weight)[0]
    assert apart([expected["implicit"]], [expected["reversible"]]) < 5e-2


def test_tiny_gradients_are_solved_like_large_ones(layer):
    module, x = layer
    z, info = dq.equilibrium(lambda z: module(z, x), torch.zeros_like(x), tol=1e-5)
    parameters = list(module.parameters())
    expected = torch.autograd.grad(z.sum(), parameters, retain_graph=True)
    steps = info.adjoint.steps.tolist()
    got = torch.autograd.grad(z.sum() * 1e-26, parameters)
    assert info.adjoint.steps.tolist() == steps
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one * 1e26, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))


def test_an_overflowed_loss_passes_to_the_scaler():
    w = nn.Parameter(torch.eye(3) * 0.5)
    z, _ = dq.equilibrium(lambda z: z @ w + 1, torch.zeros(2, 3))
    (z * torch.inf).sum().backward()
    assert not bool(w.grad.isfinite().all())


def test_a_default_device_is_for_f_alone():
    """Also in the backward pass, which torch runs without it."""
    w = torch.full((1,), 0.9, dtype=torch.float64, requires_grad=True)

    def f(z):
        assert torch.get_default_device().type == "meta"
        return w * z.sin() + 1

    for gradient in ("implicit", "phantom", "reversible", "unrolled"):
        start = torch.zeros(2, 3, dtype=torch.float64)
        with torch.device("meta"):
            z, _ = dq.equilibrium(f, start, gradient=gradient, max_steps=60)
        z.sum().backward()
        assert float(w.grad) > 0


def test_nothing_to_differentiate():
    z, _ = dq.equilibrium(lambda z: 0.5 * z + 1, torch.zeros(2, 3, requires_grad=True))
    assert not z.requires_grad
    torch.testing.assert_close(z.detach(), torch.full((2, 3), 2.0), rtol=1e-3, atol=1e-3)
    constant = torch.ones(2, 3, requires_grad=True)
    z, _ = dq.equilibrium(lambda z: constant * 2, torch.zeros(2, 3))
    torch.testing.assert_close(torch.autograd.grad(z.sum(), constant)[0], torch.full((2, 3), 2.0))
