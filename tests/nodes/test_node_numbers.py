"""How many nodes rounds have: by the tolerance, by what interpolation is seen to miss, and by the memory there is."""

from __future__ import annotations

import pytest
import torch

import deqdiff_fast as dq
from deqdiff_fast.engine import system
from deqdiff_fast.nodes.grid import round_sizes
from deqdiff_fast.nodes.rounds import NodeRounds

pytestmark = pytest.mark.usefixtures("rows_are_known")

TOL = 1e-2


@pytest.fixture
def solved(mixture, ddim, noise, relative_error):
    """(solution, error) of the second solve of a model that differs from a smooth one by so much at every timestep."""

    def solve(off, steps, **settings):
        model, factors = mixture(), 1 + off * torch.randn(1000, generator=torch.Generator().manual_seed(0))
        rough = lambda x, t: model(x, t) * factors[t.long(), None, None, None]  # noqa: E731
        sampler = dq.DEQSampler(rough, ddim(steps), solver="quasi-newton", **settings)
        sampler.sample(noise(1))
        found = sampler.sample(noise(1))
        assert bool(found.converged.all())
        return found.stats, float(relative_error(found.sample, sampler.serial(noise(1)).sample).max())

    return solve


@pytest.mark.parametrize(("rough", "tol"), [(True, 5e-2), (False, 5e-2), (True, 2e-3)])
def test_a_larger_tolerance_has_fewer_nodes_unless_the_first_round_misses_more_than_the_sample(
    mixture, ddim, noise, monkeypatch, rough, tol
):
    seen, advance = [], NodeRounds._advance

    def first_round_misses(self, *args):
        found = advance(self, *args)
        if not seen:
            found = found._replace(interpolation=found.interpolation * 0 + (5.0 if rough else 0.5))
        seen.append(self)
        return found

    monkeypatch.setattr(NodeRounds, "_advance", first_round_misses)
    dq.DEQSampler(mixture(), ddim(100), solver="quasi-newton", tol=tol).sample(noise(1))
    assert seen[0].sizes == (round_sizes(100) if rough else round_sizes(100, tol=tol))
    assert round_sizes(100)[-1] != round_sizes(100, tol=5e-2)[-1]


@pytest.mark.parametrize(("steps", "part", "most"), [(100, 1.0, 4.0), (1000, 0.7, 2.0)])
def test_a_model_that_is_rough_in_time_has_more_nodes(solved, steps, part, most):
    """All timesteps of a short chain, and as many of a long one as it takes: no rounds on all of them follow."""
    stats, error = solved(2e-2, steps)
    assert stats.rounds == stats.node_rounds <= 9
    assert error < TOL
    assert stats.timesteps_evaluated <= part
    assert stats.model_evals < most * steps


@pytest.mark.parametrize(("off", "most"), [(0.0, 4.0), (3e-3, 5.5)])
def test_a_tight_tolerance_has_all_timesteps_only_where_fewer_do_not_suffice(solved, off, most):
    stats, error = solved(off, 100, tol=1e-4)
    assert stats.rounds == stats.node_rounds <= 9
    assert error < 1e-4
    assert stats.model_evals < most * 100


@pytest.mark.parametrize(("eta", "memory", "whole"), [(1.0, None, True), (0.5, None, False), (1.0, "offload", False)])
def test_all_timesteps_where_noise_leaves_nothing_between_them(mixture, ddim, eta, memory, whole):
    sampler = dq.DEQSampler(mixture(), ddim(50, eta), solver="quasi-newton", memory=memory)
    assert (sampler.options.node_sizes == [50]) is whole
    drafted = dq.DEQSampler(mixture(), ddim(50, eta), solver="draft", draft=mixture())
    assert drafted.options.node_sizes == [24, 50]


def test_nor_where_there_is_no_room_for_all_of_them(solved, noise, monkeypatch):
    monkeypatch.setattr(system, "MOST_ELEMENTS", 100 * noise(1).numel() - 1)
    stats, error = solved(3e-3, 100, tol=1e-4)
    assert stats.rounds > stats.node_rounds
    assert error < 1e-4
