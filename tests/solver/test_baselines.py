"""Published methods under their own names: the same sample, by the rules of their papers."""

from __future__ import annotations

import pytest
import torch

import deqdiff_fast as dq
from deqdiff_fast.engine import solve
from deqdiff_fast.loop.task import Lookahead
from deqdiff_fast.schedule.tables import step_variance
from deqdiff_fast.solver import Paradigms, resolve

pytestmark = pytest.mark.usefixtures("rows_are_known")


def paradigms(model, schedule, noise, width, tol):
    """Algorithm 1 of arXiv 2305.16317 for one sample and a DDIM chain with eta = 0: the sample, fronts, evaluations."""
    steps, level = schedule.num_steps, schedule.signal.square()
    var = (1 - level[1:]) / (1 - level[:-1]) * (1 - level[:-1] / level[1:])
    var[-1] = var[:-1].min() if var[-1] == 0 else var[-1]
    x = noise.double().expand(steps + 1, *noise.shape[1:]).clone()
    begin, fronts, evaluations = 0, [], 0
    while begin < steps:
        end = min(begin + width, steps)
        eps = model(x[begin:end], schedule.timesteps[begin:end])
        evaluations += end - begin
        a0, s0, a1, s1 = (
            t[begin:end, None, None, None]
            for t in (schedule.signal[:-1], schedule.sigma[:-1], schedule.signal[1:], schedule.sigma[1:])
        )
        step = a1 * (x[begin:end] - s0 * eps) / a0 + s1 * eps
        new = x[begin] + (step - x[begin:end]).cumsum(0)
        ratio = (new - x[begin + 1 : end + 1]).square().flatten(1).mean(1) / var[begin:end]
        x[begin + 1 : end + 1] = new
        above = (ratio > tol**2).nonzero().flatten()
        front = begin + (max(1, int(above[0])) if len(above) else end - begin)
        x[end + 1 : min(front + width, steps) + 1] = x[end]
        begin = front
        fronts.append(begin)
    return x[-1:], fronts, evaluations


@pytest.mark.parametrize("width", [50, 12])
@pytest.mark.parametrize("policy", [None, Lookahead(near=float("inf"))], ids=["host", "late"])
def test_paradigms_is_the_papers_algorithm(monkeypatch, mixture, ddim, noise, relative_error, width, policy):
    monkeypatch.setattr(solve, "lookahead_policy", lambda system, request: policy)
    model, schedule, start = mixture(), ddim(50), noise(3).double()
    expected = [paradigms(model, schedule, start[b : b + 1], width, 0.1) for b in range(3)]
    fronts = []
    sampler = dq.DEQSampler(model, schedule, solver=Paradigms(tol=0.1), window=width)
    out = sampler.sample(start, callback=lambda info: fronts.append(info.front.tolist()))
    assert out.stats.window == width
    assert out.stats.rounds == max(len(known) for _, known, _ in expected) < 50
    assert out.stats.model_evals == sum(evaluations for _, _, evaluations in expected)
    for b, (sample, known, _) in enumerate(expected):
        assert relative_error(out.sample[b : b + 1], sample).max() < 1e-10
        if policy is None:
            assert [front[b] for front in fronts][: len(known)] == known


@pytest.mark.parametrize(("name", "tol"), [("paradigms", 0.2), ("parataa", 1.0)])
def test_baselines_start_from_copies_and_so_does_what_enters_the_window(mixture, ddim, noise, name, tol):
    model, inputs, fronts = mixture(), [], []

    def spy(x, t):
        inputs.append(x.clone())
        return model(x, t)

    start = noise(1)
    sampler = dq.DEQSampler(spy, ddim(30), solver=name, window=10, tol=tol)
    sampler.sample(start, callback=lambda info: fronts.append(int(info.front[0])))
    assert torch.equal(inputs[0], start.expand(10, *start.shape[1:]))
    front, second = fronts[0], inputs[1]  # states front .. front + 9, of which those from 11 on are new, as 10
    assert 2 <= front <= 9
    assert torch.equal(second[-front:], second[-1:].expand_as(second[-front:]))
    assert not torch.equal(second[-front - 1], second[-1])


def test_what_paradigms_calls_converged_is_within_the_tolerance(relative_error):
    """On the bundled model: judged by the rule at the tolerance itself, samples were off by 4 times that."""
    loading = pytest.importorskip("deqdiff_fast.integrations.diffusers")
    loaded = loading.load_model("bundled")
    schedule = loading.ddim_schedule(loaded.scheduler, 20)
    start = torch.stack([torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(seed)) for seed in (2, 3)])
    sampler = dq.DEQSampler(loaded.model, schedule, solver="paradigms")
    out = sampler.sample(start)
    assert out.converged.all()
    assert out.stats.finished_serially == 0
    assert relative_error(out.sample, sampler.serial(start).sample).max() <= 1e-2


def test_settings():
    solver = resolve("parataa")
    assert isinstance(solver, dq.Anderson)
    assert (solver.name, solver.scope, solver.history, solver.damping) == ("parataa", "triangular", 3, 1.0)
    assert (solver.guess, solver.tol, solver.max_rounds) == ("copy", None, None)
    solver = resolve("paradigms")
    assert (solver.name, solver.guess, solver.tol, solver.max_rounds) == ("paradigms", "copy", None, None)


@pytest.mark.parametrize("setting", [{"tol": 0.0}, {"tol": float("nan")}, {"tol": float("inf")}, {"max_rounds": 0}])
def test_bad_settings_of_paradigms(setting):
    with pytest.raises(ValueError, match=rf"{next(iter(setting))}: expected .* got {next(iter(setting.values()))}"):
        Paradigms(**setting)


def test_variance_of_a_step():
    level = torch.tensor([0.1, 0.4, 0.9, 1.0], dtype=torch.float64)
    beta = 1 - level[:-1] / level[1:]
    expected = (1 - level[1:]) / (1 - level[:-1]) * beta  # Ho et al. 2020, eq. 7
    expected[-1] = expected[:-1].min()
    assert torch.allclose(step_variance(level.sqrt(), (1 - level).sqrt()), expected)
    backwards = step_variance(level.sqrt().flip(0), (1 - level).sqrt().flip(0))
    assert torch.equal(backwards, torch.ones(3, dtype=torch.float64))
