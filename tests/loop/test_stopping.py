"""Which rows are final: by what they have left to go, not by how far they went."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

import deqdiff_fast as dq
from deqdiff_fast.engine import solve
from deqdiff_fast.kernels.stopping import MAX_RATE, MIN_RATE
from deqdiff_fast.loop.stopping import StallDetector, StoppingRule, reset_steps
from deqdiff_fast.loop.task import Lookahead
from deqdiff_fast.loop.window import Window
from deqdiff_fast.nodes.rounds import NodeRounds

FREEZE, FLOOR = 1e-3, 1e-6


def judged(*steps):
    """The judgement of the last of one row's steps, as a relative step."""
    previous = torch.empty(1, 1, dtype=torch.float64)
    reset_steps(previous)
    rule, one = StoppingRule(FREEZE, 1.0, FLOOR), torch.ones(1, dtype=torch.float64)
    for step in steps:
        diff, norm = torch.tensor([[step**2 * 4.0]], dtype=torch.float64), torch.full((1, 1), 4.0, dtype=torch.float64)
        rule.mark_converged(SimpleNamespace(sq_diff=diff, sq_norm=norm, backend="auto"), previous, one)
    return float((diff / norm).sqrt())


def test_a_first_step_counts_as_it_is():
    assert judged(0.9e-3) <= FREEZE
    assert judged(1.1e-3) > FREEZE


def test_a_fast_row_is_final_before_a_slow_one():
    assert judged(1.0, 5e-3) <= FREEZE  # 0.005 / 9 left to go at the fastest rate that is believed
    assert judged(1.0, 10e-3) > FREEZE
    assert judged(0.9e-3 / 0.8, 0.9e-3) > FREEZE  # 4 times as much left to go
    assert judged(0.2e-3 / 0.8, 0.2e-3) <= FREEZE
    assert judged(0.5e-3, 0.5e-3) > FREEZE  # it does not contract at all


def test_rounding_is_final_though_it_does_not_contract():
    assert judged(0.9e-6, 0.9e-6) <= FREEZE


def test_long_steps_stay_as_they_are():
    assert judged(1.0, 0.5) == pytest.approx(0.5)
    assert judged(math.inf) == math.inf
    assert math.isnan(judged(1.0, math.nan))
    assert judged(0.0, 0.0) == 0.0
    assert judged(math.inf, 0.5e-3) <= FREEZE
    assert 0 < MIN_RATE < MAX_RATE < 1


@pytest.mark.parametrize("policy", [None, Lookahead(), Lookahead(near=0)], ids=["host", "late", "always late"])
def test_a_sample_that_hangs_on_an_early_choice(monkeypatch, mixture, ddim, relative_error, policy):
    """Sharp clusters: a relative change of 1e-3 in one of these noises leads to another sample."""
    monkeypatch.setattr(solve, "lookahead_policy", lambda system, request: policy)
    model, schedule = mixture((3, 16, 16), components=10), ddim(50)
    model.variance = 0.01
    start = 1.001 * torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(1))[24:28]
    sampler = dq.DEQSampler(model, schedule, solver=dq.QuasiNewton(nodes=False))
    reference = sampler.serial(start).sample
    moved = relative_error(sampler.serial(start / 1.001).sample, reference)
    assert moved.max() > 1, "the test must meet a sensitive noise"
    out = sampler.sample(start)
    assert out.converged.all()
    assert relative_error(out.sample, reference).max() < 1e-2
    nodes = dq.DEQSampler(model, schedule, solver="quasi-newton").sample(start)
    assert nodes.converged.all()
    assert relative_error(nodes.sample, reference).max() < 1e-2
    loose = dq.DEQSampler(model, schedule, solver=dq.QuasiNewton(strict=None, nodes=False)).sample(start)
    assert relative_error(loose.sample, reference)[moved.argmax()] > 1, "without the vigil it is another sample"


@pytest.mark.parametrize("policy", [None, Lookahead(), Lookahead(near=0)], ids=["host", "late", "always late"])
def test_a_near_trajectory_is_not_taken_for_the_answer(monkeypatch, mixture, ddim, relative_error, policy):
    """The chain of a noise that is 1e-3 off fits everywhere but in its first state; it ends in another sample."""
    monkeypatch.setattr(solve, "lookahead_policy", lambda system, request: policy)
    model, schedule = mixture((3, 16, 16), components=10), ddim(50)
    model.variance = 0.01
    start = 1.001 * torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(1))[24:28]
    sampler = dq.DEQSampler(model, schedule, solver="quasi-newton")
    reference = sampler.serial(start, return_trajectory=True)
    near = sampler.serial(start / 1.001, return_trajectory=True).trajectory
    out = sampler.sample(start, init_trajectory=near)
    assert relative_error(near[-1], reference.sample).max() > 1, "the test must meet a sensitive noise"
    assert relative_error(out.sample, reference.sample)[out.converged].max() < 1e-2
    assert out.converged.all()
    same = sampler.sample(start, init_trajectory=reference.trajectory)
    assert same.stats.rounds <= (1 if policy is None else 2)
    assert same.converged.all()


def test_one_short_round_ends_no_doubted_sample():
    """Steps of three samples: short and doubted, short, and doubted with all rows final."""
    steps = torch.tensor([[0.9, 0.9, 1e-4], [0.5, 0.5, 1e-4]], dtype=torch.float64)
    chain = SimpleNamespace(sq_diff=steps**2 * 4, sq_norm=torch.full_like(steps, 4.0))
    rule = StoppingRule(FREEZE, 1.0, FLOOR)
    rule.hold(chain, torch.tensor([True, False, True]))
    window = Window(2, 3, 2)
    rule.advance(window, (chain.sq_diff / chain.sq_norm).sqrt().t().tolist())
    assert window.lo == [1, 2, 2]


def test_samples_that_nodes_leave_are_doubted(monkeypatch, mixture, ddim, noise):
    """Full rounds that follow nodes begin with what those have made of every sample that is not done."""
    seen = []
    monkeypatch.setattr(StoppingRule, "hold", lambda self, chain, samples: seen.append(samples.tolist()))
    sampler = dq.DEQSampler(mixture(), ddim(20), solver="quasi-newton", certify="full")
    done = sampler.sample(noise(2))
    assert done.converged.all()
    assert seen == [[False, False]]
    monkeypatch.setattr(NodeRounds, "_note_done", lambda self, trace: None)
    seen.clear()
    sampler.sample(noise(2))
    assert seen == [[True, True]]


def test_a_vigil_names_each_sample_once():
    vigil = StallDetector(3, dq.QuasiNewton(), 1e-3)
    assert vigil.update([1.0, 1.0, 1.0]) == []
    assert vigil.update([0.5, 0.95, 2.0]) == [1, 2]
    assert vigil.update([0.49, 1.0, 3.0]) == [0]
    assert vigil.update([1.0, 1.0, 1.0]) == []
    quiet = StallDetector(1, dq.QuasiNewton(), 1e-3)
    assert quiet.update([0.9e-3]) == []
    assert quiet.update([0.9e-3]) == []
    assert StallDetector(1, dq.Picard(), 1e-3).update([1.0]) == []
