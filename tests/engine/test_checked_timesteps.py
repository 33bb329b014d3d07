"""What later solves do with what the first ones of a model have seen between their nodes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import deqdiff_fast as dq
from deqdiff_fast.engine.checked_timesteps import CheckedTimesteps

pytestmark = pytest.mark.usefixtures("rows_are_known")


class GuidedForAWhile:
    """The velocity of Gaussian data, and half as much again at some timesteps."""

    def __init__(self, times):
        self.times = times

    def __call__(self, x, t):
        sigma = (t / 1000).to(x.dtype)[:, None]
        clean = 0.3 + (1 - sigma) * 0.2 * (x - (1 - sigma) * 0.3) / ((1 - sigma) ** 2 * 0.2 + sigma**2)
        return (x - clean) / sigma * (1 + 0.5 * torch.isin(t.float(), self.times.float())[:, None])


def test_an_interval_that_some_nodes_pass_over(noise, relative_error):
    """The first solve has seen it and put nodes there; those after it have others, by what they see of their sample."""
    schedule = dq.Schedule.from_sigmas(torch.linspace(1, 0, 51), flow=True)
    model = GuidedForAWhile(schedule.timesteps[26:29])
    sampler = dq.DEQSampler(model, schedule, solver="quasi-newton", tol=1e-2)
    for seed in range(6):
        start = noise(2, (192,), seed=seed)
        found = sampler.sample(start)
        assert found.converged.all()
        error = relative_error(found.sample, sampler.serial(start).sample).max().item()
        assert error < 1.2e-2, f"solve {seed}: {error:.1e} after {found.stats.rounds} rounds"


def test_a_smooth_model_hides_nothing(mixture, ddim, noise):
    sampler = dq.DEQSampler(mixture(), ddim(200), solver="quasi-newton")
    checks = [sampler.sample(noise(1)).stats.check_evals for _ in range(2)]
    assert checks[1] <= 2 < checks[0]


def test_what_nodes_may_pass_over_is_asked_in_every_solve():
    known = CheckedTimesteps(torch.ones(50))
    first = known.spots(1e-2, 1)
    assert len(first.timesteps) == 50
    known.learn(first, SimpleNamespace(rough=False), 1e-2, {21, 22, 23})
    for _ in range(2):
        spots = known.spots(1e-2, 1)
        assert {21, 22, 23} < set(spots.timesteps)
        assert len(spots.timesteps) <= 5
        known.learn(spots, SimpleNamespace(rough=False), 1e-2)
    known.learn(spots, SimpleNamespace(rough=True), 1e-2)
    assert len(known.spots(1e-2, 1).timesteps) == 50
