"""Every gradient mode against back-propagation through the serial chain, and what it costs in memory."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import deqdiff_fast as dq
import deqdiff_fast.sampler
from deqdiff_fast.gradient.batched_vjp import CHUNK, BatchedVJP


class Learned(nn.Module):
    """An exact score whose means are parameters; the chain alone decides the precision of its gradient."""

    def __init__(self, exact, dtype) -> None:
        super().__init__()
        self.exact = exact
        self.means = nn.Parameter(exact.means.to(dtype))

    def forward(self, x, t):
        self.exact.means = self.means
        return self.exact(x, t)


EXACT = ["implicit", "unrolled", "reversible", dq.Reversible(0.5), dq.Reversible(1.2)]


@pytest.mark.parametrize("mode", EXACT, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_noise_and_parameters_on_a_gaussian_mixture(mixture, ddim, noise, mode, dtype, backpropagation, apart):
    """T = 50 at tolerance 1e-6 against float64: what the implicit and the reversible gradient promise."""
    schedule, start = ddim(50), noise(2, dtype=torch.float64).requires_grad_(True)
    target = noise(2, seed=9, dtype=torch.float64)
    reference = Learned(mixture(), torch.float64)
    loss = (backpropagation(reference, schedule, start) - target).square().sum()
    expected = torch.autograd.grad(loss, [start, reference.means])
    model, given = Learned(mixture(), dtype), start.detach().to(dtype).requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = dq.DEQSampler(model, schedule, solver="quasi-newton", tol=1e-6, gradient=mode).sample(given)
        got = torch.autograd.grad((out.sample - target.to(dtype)).square().sum(), [given, model.means])
    assert out.converged.all()
    assert out.stats.stop_reason == "converged"
    for a, b in zip(got, expected, strict=True):
        error, angle = apart(a, b)
        assert error <= 1e-3
        assert angle <= 1e-4


@pytest.fixture(scope="module")
def bundled():
    """The model that comes with the package, in float32 and float64, and its schedules."""
    pytest.importorskip("diffusers")
    from deqdiff_fast.integrations.diffusers import ddim_schedule, load_model

    loaded = load_model("bundled")
    loaded.model.requires_grad_(True)
    return loaded.model, copy.deepcopy(loaded.model).double(), lambda steps: ddim_schedule(loaded.scheduler, steps)


@pytest.mark.parametrize(("mode", "steps"), [("implicit", 10), ("reversible", 5)])
def test_noise_and_parameters_on_the_bundled_model(bundled, noise, mode, steps, backpropagation, apart):
    model, wide, schedule = bundled[0], bundled[1], bundled[2](steps)
    start, target = (noise(1, (3, 32, 32), seed) for seed in (0, 1))

    def sample(x, t):
        return wide(x, t).sample

    exact = start.double().requires_grad_(True)
    loss = (backpropagation(sample, schedule, exact) - target.double()).square().sum()
    expected = torch.autograd.grad(loss, [exact, *wide.parameters()])
    given = start.clone().requires_grad_(True)
    out = dq.DEQSampler(model, schedule, solver="quasi-newton", tol=1e-6, gradient=mode).sample(given)
    got = torch.autograd.grad((out.sample - target).square().sum(), [given, *model.parameters()])
    for a, b in ((got[:1], expected[:1]), (got[1:], expected[1:])):
        error, angle = apart(*(torch.cat([x.double().flatten() for x in parts]) for parts in (a, b)))
        assert error <= 1e-3
        assert angle <= 1e-4


@pytest.mark.parametrize("mode", EXACT[:3])
@pytest.mark.parametrize("kind", ["ddim", "multistep"])
def test_conditioning_and_multistep_schedules(ddim, mode, kind, bent, backpropagation, apart):
    sigmas = [*torch.linspace(3, 0.1, 12, dtype=torch.float64).tolist(), 0.0]
    schedule = ddim(12)
    if kind == "multistep":
        schedule = dq.Schedule.from_sigmas(sigmas, "dpmpp_2m", prediction_type="epsilon")
    model, draw = bent(), torch.Generator().manual_seed(1)
    start, cond = (torch.randn(3, 6, generator=draw, dtype=torch.float64, requires_grad=True) for _ in range(2))
    leaves = [start, cond, *model.parameters()]
    expected = torch.autograd.grad(backpropagation(model, schedule, start, cond=cond).pow(3).sum(), leaves)
    out = dq.DEQSampler(model, schedule, solver="quasi-newton", tol=1e-8, gradient=mode, max_batch=5).sample(
        start, {"cond": cond}
    )
    for a, b in zip(torch.autograd.grad(out.sample.pow(3).sum(), leaves), expected, strict=True):
        assert apart(a, b)[0] <= 1e-5


def test_a_solve_that_copies_the_conditions(ddim, monkeypatch, bent, backpropagation, apart):
    """As one does whose device work is recorded: the gradient is still with respect to what was given."""
    model, schedule, draw = bent().requires_grad_(False), ddim(12), torch.Generator().manual_seed(1)
    start = torch.randn(3, 6, generator=draw, dtype=torch.float64)
    cond = torch.randn(3, 6, generator=draw, dtype=torch.float64, requires_grad=True)
    solve = deqdiff_fast.sampler.solve_parallel

    def copying(system, options, request):
        solution = solve(system, options, request)
        system.model_kwargs = {"cond": cond.detach().clone()}
        return solution

    monkeypatch.setattr(deqdiff_fast.sampler, "solve_parallel", copying)
    out = dq.DEQSampler(model, schedule, solver="quasi-newton", tol=1e-8).sample(start, {"cond": cond})
    expected = torch.autograd.grad(backpropagation(model, schedule, start, cond=cond).pow(3).sum(), cond)
    assert apart(torch.autograd.grad(out.sample.pow(3).sum(), cond)[0], expected[0])[0] <= 1e-6


class Rude(nn.Module):
    """A model whose first layer works in place."""

    def __init__(self, inner) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x, t):
        return self.inner(x.mul_(0.5), t)


@pytest.mark.parametrize("mode", EXACT[:3])
def test_noise_made_under_inference_mode(ddim, mode, bent):
    model, start = bent(), torch.ones(3, 6, dtype=torch.float64)
    with torch.inference_mode():
        given = start.clone()
    sampler = dq.DEQSampler(model, ddim(12), solver="quasi-newton", gradient=mode)
    found = [torch.autograd.grad(sampler.sample(x).sample.sum(), [*model.parameters()]) for x in (given, start)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("mode", EXACT[:3])
def test_a_model_that_writes_to_its_input(ddim, mode, bent, backpropagation, apart):
    model, schedule, draw = Rude(bent()), ddim(12), torch.Generator().manual_seed(1)
    start = torch.randn(3, 6, generator=draw, dtype=torch.float64, requires_grad=True)
    leaves = [start, *model.parameters()]
    expected = torch.autograd.grad(backpropagation(model, schedule, start).pow(3).sum(), leaves)
    out = dq.DEQSampler(model, schedule, solver="quasi-newton", tol=1e-8, gradient=mode).sample(start)
    for a, b in zip(torch.autograd.grad(out.sample.pow(3).sum(), leaves), expected, strict=True):
        assert apart(a, b)[0] <= 1e-5


def test_predictions_of_a_model_that_has_one_output_buffer(ddim, noise):
    states, buffer = torch.randn(40, 3, 4, generator=torch.Generator().manual_seed(1)), torch.empty(CHUNK, 4)

    def found(model):
        system = dq.DEQSampler(model, ddim(40)).options.system(noise(3, (4,)), None)
        return BatchedVJP(system, {}).predictions(states)

    assert torch.equal(found(lambda x, t: torch.tanh(x, out=buffer[: len(x)])), found(lambda x, t: torch.tanh(x)))


@pytest.mark.parametrize("mode", ["unrolled", "reversible"])
def test_frozen_noise_and_warm_starts_of_the_modes_with_their_own_rounds(ddim, mode, bent, apart):
    model, schedule = bent().requires_grad_(False), ddim(12, eta=1.0)
    start = torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)

    def draws():
        return torch.Generator().manual_seed(3)

    exact = dq.DEQSampler(model, schedule).serial(start.detach(), generator=draws(), return_trajectory=True)
    sampler = dq.DEQSampler(model, schedule, solver="quasi-newton", tol=1e-7, gradient=mode)
    cold = sampler.sample(start, generator=draws(), return_trajectory=True)
    warm = sampler.sample(start, generator=draws(), init_trajectory=exact.trajectory)
    assert warm.stats.rounds < cold.stats.rounds
    assert warm.trajectory is None
    for out in (cold, warm):
        assert torch.allclose(out.sample, exact.sample, rtol=1e-6, atol=1e-7)
    assert torch.allclose(cold.trajectory, exact.trajectory, rtol=1e-5, atol=1e-6)
    expected = torch.autograd.grad(
        dq.DEQSampler(model, schedule, solver="quasi-newton", tol=1e-10)
        .sample(start, generator=draws())
        .sample.square()
        .sum(),
        start,
    )
    got = torch.autograd.grad(cold.sample.square().sum(), start)
    assert apart(got[0], expected[0])[0] <= 1e-5


def test_the_tolerance_of_the_adjoint_is_its_own(ddim, bent, backpropagation, apart):
    schedule, model, calls = ddim(40), bent(), []
    start = torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    expected = torch.autograd.grad(backpropagation(model, schedule, start).pow(3).sum(), start)[0]
    errors, counts = [], []
    for tol in (1e-1, 1e-3, 1e-6):
        sampler = dq.DEQSampler(model, schedule, solver="quasi-newton", tol=1e-8, gradient=dq.Implicit(tol=tol))
        out = sampler.sample(start)
        handle = model.register_forward_hook(lambda module, x, y: calls.append(len(y)))
        errors.append(apart(torch.autograd.grad(out.sample.pow(3).sum(), start)[0], expected)[0])
        handle.remove()
        counts.append(sum(calls))
        calls.clear()
        assert errors[-1] <= tol
    assert errors[0] > errors[2]
    assert counts[0] < counts[1] < counts[2]


def test_phantom_with_one_step_holds_no_jacobian(ddim, bent):
    """The paper's setting: tau times the state coefficients' product, and no backward pass of the model."""
    schedule, backward = ddim(10), []

    class RecordsBackward(type(bent())):
        def forward(self, x, t):
            out = super().forward(x, t)
            if out.requires_grad:
                out.register_hook(backward.append)
            return out

    start = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    model = RecordsBackward().requires_grad_(False)
    out = dq.DEQSampler(model, schedule, solver="quasi-newton", gradient="phantom", tol=1e-6).sample(start)
    (got,) = torch.autograd.grad(out.sample.square().sum(), start)
    assert torch.allclose(got, 0.1 * float(schedule.state_coef.prod()) * 2 * out.sample.detach())
    assert not backward


def test_phantom_is_the_derivative_of_damped_rounds(ddim, bent, apart):
    """Against autograd through the damped rounds themselves, from the solution."""
    schedule, model, tau, steps = ddim(8), bent(), 0.4, 3
    start = torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    sampler = dq.DEQSampler(model, schedule, solver="quasi-newton", tol=1e-12, gradient=dq.Phantom(tau, steps))
    out = sampler.sample(start, return_trajectory=True)
    z = out.trajectory.clone()
    for _ in range(steps):
        f = [start]
        for i in range(8):
            prediction = model(z[i], schedule.timesteps[i].expand(2))
            f.append(schedule.state_coef[i, 0] * f[-1] + schedule.model_coef[i, 0] * prediction)
        z = (1 - tau) * z + tau * torch.stack(f)
    leaves = [start, *model.parameters()]
    expected = torch.autograd.grad(z[-1].pow(3).sum(), leaves)
    got = torch.autograd.grad(out.sample.pow(3).sum(), leaves)
    for a, b in zip(got, expected, strict=True):
        assert apart(a, b)[0] <= 1e-9


def test_undamped_phantom_steps_become_exact(ddim, bent, backpropagation, apart):
    schedule, model = ddim(8), bent()
    start = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(backpropagation(model, schedule, start).pow(3).sum(), start)[0]
    errors = []
    for steps in (1, 9):
        out = dq.DEQSampler(model, schedule, solver="quasi-newton", tol=1e-10, gradient=dq.Phantom(1.0, steps)).sample(
            start
        )
        errors.append(apart(torch.autograd.grad(out.sample.pow(3).sum(), start)[0], expected)[0])
    assert errors[0] > 0.1
    assert errors[1] <= 1e-8
