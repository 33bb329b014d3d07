"""The error that the unknowns of a restoration are allowed."""

from __future__ import annotations

import pytest
import torch

import deqdiff_fast as dq
from deqdiff_fast.operators import Downsample
from deqdiff_fast.restoration import tolerance
from deqdiff_fast.restoration.slope import conditional_spectrum
from deqdiff_fast.restoration.tolerance import add_up, looser, near_enough, shares


def test_the_factor_follows_what_is_known():
    nothing, much = torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)
    assert looser(nothing, 0.1, 0.25) == 1.0  # black measurements: the unknowns are the sample
    assert looser(much, 0.1, 0.25) == 2.75  # 0.9 / sqrt(0.1), in quarters
    assert looser(torch.stack([nothing[0], much[0]]), 0.1, 0.25) == 1.0  # the sample that can least
    assert looser(much, 1e-9, 0.25) == tolerance.MOST


def test_a_solve_that_was_allowed_too_much_is_not_near_enough():
    known = torch.zeros(1, 3, 4, 4)
    known[:, :2] = 1.0
    sample = torch.ones(1, 3, 4, 4)
    share = shares(known, sample)
    assert float(share) == pytest.approx((1 / 3) ** 0.5)
    stats = dq.Stats(solver="x", window=1, rounds=5, error_estimate=torch.tensor([0.02], dtype=torch.float64))
    assert near_enough(stats, share, 1.5, 0.015)  # 1.5 x 0.577 < 1
    assert not near_enough(stats, share, 2.0, 0.02)
    stats.node_rounds = 5
    assert not near_enough(stats, share, 2.0, 0.02)  # 0.02 x 0.577 > 0.02 / 2
    stats.error_estimate = stats.error_estimate / 2
    assert near_enough(stats, share, 2.0, 0.02)
    other = dq.Stats(solver="x", window=1, rounds=3, model_evals=10)
    add_up(stats, [other])
    assert (stats.rounds, stats.model_evals) == (8, 10)


def test_a_second_solve_follows_where_the_guess_was_wrong(mixture, ddim, monkeypatch, relative_error):
    monkeypatch.setattr("deqdiff_fast.restorer.looser", lambda known, unseen, variance: 50.0)
    spectrum = dq.SpectralSlope(torch.full((3, 8, 8), 0.4), torch.eye(3))
    restorer = dq.DEQRestorer(mixture((3, 8, 8)), ddim(20), Downsample(2), solver="quasi-newton", spectrum=spectrum)
    y = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 0.3
    found, exact = (
        solve(y, generator=torch.Generator().manual_seed(1)) for solve in (restorer.restore, restorer.serial)
    )
    assert float(relative_error(found.sample, exact.sample).max()) < 1e-2
    again = restorer.restore(y, generator=torch.Generator().manual_seed(1))
    assert found.stats.rounds > again.stats.rounds  # two solves, and then no such guess any more


def test_what_is_left_open_is_less_than_there_was():
    flat = dq.SpectralSlope(torch.full((1, 16, 16), 0.5), torch.eye(1))
    left, unseen = conditional_spectrum(Downsample(2), flat, 0.0, 1, torch.device("cpu"))
    assert unseen == pytest.approx(0.75, abs=0.05)  # one of four directions is measured
    assert float(left.variance.mean()) == pytest.approx(0.375, abs=0.03)
    assert float(left.variance[0, 0, 0]) < 0.05  # the mean of all pixels is known
