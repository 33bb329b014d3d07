"""Rounds with a draft: the same sample whatever the draft says, and fewer rounds the better it is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import deqdiff_fast as dq
from deqdiff_fast.engine import solve
from deqdiff_fast.loop.task import Lookahead
from deqdiff_fast.nodes import chain
from deqdiff_fast.nodes.rounds import UNTOLD

TIGHT = {"tol": 1e-4, "max_batch": 512}


class Shifted:
    """The model with an error of its own, smooth in the state: a draft."""

    def __init__(self, model, size: float) -> None:
        self.model, self.size, self.rows = model, size, 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.rows += len(x)
        return self.model(x, t) + self.size * torch.sin(3 * x)


def error(found: Tensor, expected: Tensor) -> float:
    return float(((found - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)).max())


def solved(model, schedule, noise, draft, generator=None, **options):
    """(solution, its error against the serial chain)."""
    seed = (lambda: torch.Generator().manual_seed(3)) if schedule.stochastic else lambda: None
    sampler = dq.DEQSampler(model, schedule, draft=draft, **({"solver": "draft"} | TIGHT | options))
    with torch.no_grad():
        found = sampler.sample(noise, generator=seed())
        return found, error(found.sample, sampler.serial(noise, generator=seed()).sample)


def test_a_perfect_draft_takes_the_fewest_rounds(mixture, ddim, noise):
    model = mixture()
    draft = Shifted(model, 0.0)
    found, off = solved(model, ddim(100), noise(), draft, tol=1e-2)
    assert UNTOLD < found.stats.rounds == found.stats.node_rounds <= UNTOLD + 2, "before that no estimate is believed"
    assert found.converged.all()
    assert off < 1e-2
    without = solved(model, ddim(100), noise(), None, solver="quasi-newton", tol=1e-2)[0]
    drafted, plain = (one.stats.model_evals - one.stats.check_evals for one in (found, without))
    assert drafted < plain
    assert found.stats.draft_evals == draft.rows > 0


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    "draft",
    [
        lambda x, t: torch.zeros_like(x),
        lambda x, t: torch.full_like(x, float("nan")),
        lambda x, t: 30 * torch.cos(7 * x),
        lambda x, t: 1e30 * x,
    ],
    ids=["silent", "nan", "wild", "overflowing"],
)
def test_the_sample_does_not_depend_on_the_draft(mixture, ddim, noise, draft, eta):
    found, off = solved(mixture(), ddim(20, eta), noise(), draft)
    assert found.converged.all()
    assert off < 1e-4


@pytest.mark.parametrize("method", ["dpmpp_2m", "euler"])
def test_schedules_of_other_kinds(mixture, noise, karras, method):
    sigmas = karras(20)

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        """The clean sample expected of a mixture of two points, spread a little."""
        means = torch.stack([torch.full_like(x[0], 0.5), torch.linspace(-1, 1, x[0].numel()).view_as(x[0])]).flatten(1)
        total = sigma[:, None].square() + 0.1
        gap = x.flatten(1)[:, None] - means
        share = (-gap.square().sum(-1) / (2 * total)).softmax(-1)
        return (x.flatten(1) - sigma[:, None].square() * (share[..., None] * gap).sum(1) / total).view_as(x)

    schedule = dq.Schedule.from_sigmas(sigmas, method=method)
    start = noise() * schedule.init_noise_sigma
    plain = dq.DEQSampler(denoiser, schedule, **TIGHT, solver="quasi-newton").sample(start)
    found, off = solved(denoiser, schedule, start, lambda x, s: denoiser(x, s) + 0.02 * torch.sin(x))
    assert found.converged.all()
    assert off < 1e-4
    assert found.stats.rounds <= plain.stats.rounds


def test_a_linear_draft_is_quasi_newton(mixture, ddim, noise, monkeypatch):
    """But for what sweeps leave, when they go on until the sample stands still."""
    for name, value in (("LOOSE", 0.0), ("SETTLED", 1e-3), ("SWEEPS", 50)):
        monkeypatch.setattr(chain, name, value)
    schedule, model, start = ddim(50), mixture(), noise(seed=1)
    slope = dict(zip(schedule.timesteps.tolist(), schedule.slope().float()))

    def linear(x: Tensor, t: Tensor) -> Tensor:
        return x * torch.stack([slope[int(k)] for k in t])[:, None, None, None]

    found, _ = solved(model, schedule, start, linear, solver=dq.Drafted(slope="scalar", history=0), tol=1e-2)
    newton, _ = solved(model, schedule, start, None, solver=dq.QuasiNewton(slope="scalar", history=0), tol=1e-2)
    assert found.stats.rounds == newton.stats.rounds
    assert torch.allclose(found.stats.residual_trace, newton.stats.residual_trace, rtol=1e-3)


def test_better_drafts_take_fewer_rounds(mixture, ddim, noise):
    model = mixture()
    rounds = []
    for size in (0.1, 3.0):
        found, off = solved(model, ddim(50), noise(), Shifted(model, size), tol=1e-2)
        assert found.converged.all()
        assert off < 1e-2
        rounds.append(found.stats.rounds)
    assert rounds[0] < rounds[1]


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_multistep_chains_and_noise(mixture, noise, ddim, karras, eta):
    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        return torch.tanh(2 * x / (1 + sigma[:, None, None, None] ** 2))

    if eta:
        model, schedule = mixture(), ddim(60, eta)
    else:
        model, schedule = denoiser, dq.Schedule.from_sigmas(karras(40), method="dpmpp_2m")
    start = noise(3) * schedule.init_noise_sigma
    found, off = solved(model, schedule, start, Shifted(model, 0.01))
    assert found.converged.all()
    assert found.stats.finished_serially == 0
    assert off < 1e-4


@pytest.mark.parametrize("window", [1, 6, 20])
def test_windows_and_batches(mixture, ddim, noise, window):
    model = mixture()
    found, off = solved(model, ddim(20), noise(5), Shifted(model, 0.05), window=window)
    assert found.converged.all()
    assert found.stats.finished_serially == 0
    assert off < 1e-4


def test_secants_help_where_the_draft_does_not(mixture, ddim, noise):
    model = mixture()
    without, with_them = (
        sum(
            solved(model, ddim(50), noise(seed=seed), Shifted(model, 0.2), solver=dq.Drafted(history=h), tol=1e-3)[0]
            .stats.rounds
            for seed in range(4)
        )
        for h in (0, 3)
    )  # fmt: skip
    assert with_them < without


def test_auto_takes_the_draft_and_plans_with_it(mixture, ddim, noise):
    model = mixture()
    draft = Shifted(model, 0.02)
    sampler = dq.DEQSampler(model, ddim(20), draft=draft)
    assert sampler.solver.name == "draft"
    plan = sampler.warmup((3, 8, 8), batch=2)
    assert plan is not None
    assert draft.rows > 0  # a warm-up measures it
    found = sampler.sample(noise())
    assert found.converged.all()
    assert error(found.sample, sampler.serial(noise()).sample) < 1e-2


@pytest.mark.parametrize("policy", [Lookahead(near=float("inf")), Lookahead(near=0.0)])
def test_the_loop_on_the_device(mixture, ddim, noise, monkeypatch, policy):
    model = mixture()
    ahead = solved(model, ddim(20), noise(3), Shifted(model, 0.05))[0]
    monkeypatch.setattr(solve, "lookahead_policy", lambda system, request: policy)
    found, off = solved(model, ddim(20), noise(3), Shifted(model, 0.05))
    assert found.converged.all()
    assert off < 1e-4
    assert ahead.stats.rounds <= found.stats.rounds <= ahead.stats.rounds + 1


def test_conditions_reach_the_draft(ddim, noise):
    seen = list[list[float]]()

    def model(x: Tensor, t: Tensor, shift: Tensor) -> Tensor:
        return 0.5 * x + 0.1 * torch.sin(x + shift[:, None, None, None])

    def draft(x: Tensor, t: Tensor, shift: Tensor) -> Tensor:
        assert len(shift) == len(t) == len(x)
        seen.append(shift[t == t[0]].tolist())
        return model(x, t, shift)

    sampler = dq.DEQSampler(model, ddim(20), solver="draft", draft=draft, tol=1e-2)
    found = sampler.sample(noise(3), {"shift": torch.tensor([0.0, 1.0, 2.0])})
    assert found.converged.all()
    assert seen[0] == [0.0, 1.0, 2.0]
    assert sum(map(len, seen[1:])) < 3 * len(seen[1:]), "of some samples alone, too"
    other = dq.DEQSampler(
        model, ddim(20), solver="draft", draft=lambda x, t, shift: draft(x, t, shift.flip(0)), tol=1e-2
    )
    wrong = other.sample(noise(3), {"shift": torch.tensor([0.0, 1.0, 2.0])})
    assert found.stats.model_evals < wrong.stats.model_evals


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(mixture, ddim, noise, dtype):
    model = mixture()
    found, off = solved(model, ddim(20), noise(dtype=dtype), Shifted(model, 0.05), tol=1e-2)
    assert found.sample.dtype == dtype
    assert off < 2e-2


def test_gradients_are_those_without_it(mixture, ddim, noise):
    model, start = mixture(), noise(1)
    grads = []
    for draft, solver in ((None, "quasi-newton"), (Shifted(model, 0.05), "draft")):
        x = start.clone().requires_grad_()
        dq.DEQSampler(model, ddim(10), solver=solver, draft=draft, tol=1e-6).sample(x).sample.square().sum().backward()
        grads.append(x.grad)
    assert error(grads[1], grads[0]) < 1e-3


def test_a_model_that_breaks_is_named_not_the_draft(mixture, ddim, noise):
    model = mixture()

    def broken(x: Tensor, t: Tensor) -> Tensor:
        return torch.where((t == 500)[:, None, None, None], float("nan"), model(x, t))

    with pytest.raises(dq.NonFiniteError, match="timestep 500"):
        solved(broken, ddim(20), noise(), model)


def test_what_is_refused(mixture, ddim, noise):
    model, schedule = mixture(), ddim(20)
    with pytest.raises(ValueError, match="draft="):
        dq.DEQSampler(model, schedule, solver="draft")
    with pytest.raises(TypeError, match="draft: expected a callable"):
        dq.DEQSampler(model, schedule, draft=3)
    with pytest.raises(dq.ModelOutputError, match="the draft returned"):
        solved(model, schedule, noise(), lambda x, t: x[:, :1])
    for wrong in (
        {"history": 8},
        {"ridge": 0.0},
        {"nodes": 3},
        {"max_rounds": 0},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            dq.Drafted(**wrong)
