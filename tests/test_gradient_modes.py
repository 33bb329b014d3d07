"""Every gradient mode against back-propagation through the serial chain, and what it costs in memory."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import deqdiff_fast as dq
import deqdiff_fast.sampler


class Learned(nn.Module):
    """An exact score whose means are parameters; the chain alone decides the precision of its gradient."""

    def __init__(self, exact, dtype) -> None:
        super().__init__()
        self.exact = exact
        self.means = nn.Parameter(exact.means.to(dtype))

    def forward(self, x, t):
        self.exact.means = self.means
        return self.exact(x, t)


class Tanh(nn.Module):
    """Small, smooth and conditional."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Linear(7, 16), nn.Linear(16, 6)
        self.double()

    def forward(self, x, t, cond=0.0):
        h = torch.cat([x + cond, t[:, None].to(x.dtype) / 1000], dim=1)
        return 0.6 * x + 0.4 * self.outer(torch.tanh(self.inner(h)))


def serial(model, schedule, noise, **kwargs):
    """The chain by the schedule's tables, differentiated by autograd."""
    states, outs = [noise], []
    for i in range(schedule.num_steps):
        outs.append(model(states[-1] * schedule.input_scale[i], schedule.timesteps[i].expand(len(noise)), **kwargs))
        states.append(
            sum(
                schedule.state_coef[i, lag] * states[i - lag] + schedule.model_coef[i, lag] * outs[i - lag]
                for lag in range(min(schedule.lags, i + 1))
            )
        )
    return states[-1]


def apart(got, expected):
    """(relative error, 1 - cosine)."""
    a, b = got.double().flatten(), expected.double().flatten()
    return float((a - b).norm() / b.norm()), 1 - float(torch.cosine_similarity(a, b, dim=0))


EXACT = ["implicit", "unrolled", "reversible", dq.Reversible(0.5), dq.Reversible(1.2)]


@pytest.mark.parametrize("mode", EXACT, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_noise_and_parameters_on_a_gaussian_mixture(mixture, ddim, noise, mode, dtype):
    """T = 50 at tolerance 1e-6 against float64: what the implicit and the reversible gradient promise."""
    schedule, start = ddim(50), noise(2, dtype=torch.float64).requires_grad_(True)
    target = noise(2, seed=9, dtype=torch.float64)
    reference = Learned(mixture(), torch.float64)
    loss = (serial(reference, schedule, start) - target).square().sum()
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


@pytest.mark.parametrize(("mode", "steps"), [("implicit", 20), ("reversible", 5)])
def test_noise_and_parameters_on_the_bundled_model(bundled, noise, mode, steps):
    model, wide, schedule = bundled[0], bundled[1], bundled[2](steps)
    start, target = (noise(1, (3, 32, 32), seed) for seed in (0, 1))

    def sample(x, t):
        return wide(x, t).sample

    exact = start.double().requires_grad_(True)
    loss = (serial(sample, schedule, exact) - target.double()).square().sum()
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
def test_conditioning_and_multistep_schedules(ddim, mode, kind):
    sigmas = [*torch.linspace(3, 0.1, 12, dtype=torch.float64).tolist(), 0.0]
    schedule = ddim(12)
    if kind == "multistep":
        schedule = dq.Schedule.from_sigmas(sigmas, "dpmpp_2m", prediction_type="epsilon")
    model, draw = Tanh(), torch.Generator().manual_seed(1)
    start, cond = (torch.randn(3, 6, generator=draw, dtype=torch.float64, requires_grad=True) for _ in range(2))
    leaves = [start, cond, *model.parameters()]
    expected = torch.autograd.grad(serial(model, schedule, start, cond=cond).pow(3).sum(), leaves)
    out = dq.DEQSampler(model, schedule, solver="quasi-newton", tol=1e-8, gradient=mode, max_batch=5).sample(
        start, {"cond": cond}
    )
    for a, b in zip(torch.autograd.grad(out.sample.pow(3).sum(), leaves), expected, strict=True):
        assert apart(a, b)[0] <= 1e-5


def test_a_solve_that_copies_the_conditions(ddim, monkeypatch):
    """As one does whose device work is recorded: the gradient is still with respect to what was given."""
    model, schedule, draw = Tanh().requires_grad_(False), ddim(12), torch.Generator().manual_seed(1)
    start = torch.randn(3, 6, generator=draw, dtype=torch.float64)
    cond = torch.randn(3, 6, generator=draw, dtype=torch.float64, requires_grad=True)
    solve = deqdiff_fast.sampler.solve_parallel

    def copying(system, options, request):
        solution = solve(system, options, request)
        system.model_kwargs = {"cond": cond.detach().clone()}
        return solution

    monkeypatch.setattr(deqdiff_fast.sampler, "solve_parallel", copying)
    out = dq.DEQSampler(model, schedule, solver="quasi-newton", tol=1e-8).sample(start, {"cond": cond})
    expected = torch.autograd.grad(serial(model, schedule, start, cond=cond).pow(3).sum(), cond)
    assert apart(torch.autograd.grad(out.sample.pow(3).sum(), cond)[0], expected[0])[0] <= 1e-6


@pytest.mark.parametrize("mode", ["unrolled", "reversible"])
def test_frozen_noise_and_warm_starts_of_the_modes_with_their_own_rounds(ddim, mode):
    model, schedule = Tanh().requires_grad_(False), ddim(12, eta=1.0)
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


def test_phantom_with_one_step_holds_no_jacobian(ddim):
    """The paper's setting: tau times the state coefficients' product, and no backward pass of the model."""
    schedule, backward = ddim(10), []

    class Watched(Tanh):
        def forward(self, x, t):
            out = super().forward(x, t)
            if out.requires_grad:
                out.register_hook(backward.append)
            return out

    start = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    model = Watched().requires_grad_(False)
    out = dq.DEQSampler(model, schedule, solver="quasi-newton", gradient="phantom", tol=1e-6).sample(start)
    (got,) = torch.autograd.grad(out.sample.square().sum(), start)
    assert torch.allclose(got, 0.1 * float(schedule.state_coef.prod()) * 2 * out.sample.detach())
    assert not backward


def test_phantom_is_the_derivative_of_damped_rounds(ddim):
    """Against autograd through the damped rounds themselves, from the solution."""
    schedule, model, tau, steps = ddim(8), Tanh(), 0.4, 3
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


def test_undamped_phantom_steps_become_exact(ddim):
    schedule, model = ddim(8), Tanh()
    start = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(serial(model, schedule, start).pow(3).sum(), start)[0]
    errors = []
    for steps in (1, 9):
        out = dq.DEQSampler(model, schedule, solver="quasi-newton", tol=1e-10, gradient=dq.Phantom(1.0, steps)).sample(
            start
        )
        errors.append(apart(torch.autograd.grad(out.sample.pow(3).sum(), start)[0], expected)[0])
    assert errors[0] > 0.1
    assert errors[1] <= 1e-8


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
def test_modes_with_their_own_rounds_fail_as_they_are_told(ddim, mode):
    schedule, model = ddim(12), Tanh()
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
    expected = serial(model, schedule, start)
    assert torch.allclose(out.sample, expected, rtol=1e-12)
    got = torch.autograd.grad(out.sample.pow(3).sum(), start)
    assert apart(got[0], torch.autograd.grad(expected.pow(3).sum(), start)[0])[0] <= 1e-6


@pytest.mark.parametrize("mode", ["unrolled", "reversible"])
def test_a_callback_sees_and_stops_their_rounds(ddim, mode):
    model, schedule, seen = Tanh(), ddim(12), []
    start = torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)

    def watch(info):
        seen.append((info.round, float(info.residual.max())))
        assert info.preview().shape == info.sample().shape == start.shape
        return info.round == 3

    out = dq.DEQSampler(model, schedule, solver="quasi-newton", tol=1e-12, gradient=mode).sample(start, callback=watch)
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


def test_a_reversal_that_loses_its_way_says_so(ddim, monkeypatch):
    """Rounding of a float32 model, amplified a billion times because no anchor is kept."""
    from deqdiff_fast.gradient import reversible

    monkeypatch.setattr(reversible, "GROWTH", 1e15)
    monkeypatch.setattr(reversible, "MISSED", 1e-9)
    model = Tanh().float()
    start = torch.randn(2, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    out = dq.DEQSampler(model, ddim(12), solver="quasi-newton", tol=1e-6, gradient="reversible").sample(start)
    with pytest.warns(dq.ConvergenceWarning, match="missed its start"):
        out.sample.sum().backward()


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
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
def test_bad_settings(make, error, said):
    with pytest.raises(error, match=said):
        make()


def test_bad_modes(ddim):
    with pytest.raises(ValueError, match="'implicit', 'phantom', 'unrolled', 'reversible'"):
        dq.DEQSampler(Tanh(), ddim(5), gradient="exact")
    for mode in (None, 3, dq.Phantom):
        with pytest.raises(TypeError, match="gradient"):
            dq.DEQSampler(Tanh(), ddim(5), solver="quasi-newton", gradient=mode)


def test_second_derivatives_are_refused(ddim):
    start = torch.randn(1, 6, dtype=torch.float64, requires_grad=True)
    for mode in ("implicit", "reversible"):
        out = dq.DEQSampler(Tanh(), ddim(5), solver="quasi-newton", gradient=mode).sample(start)
        (first,) = torch.autograd.grad(out.sample.pow(2).sum(), start, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            first.sum().backward()
