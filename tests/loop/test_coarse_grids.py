"""Coarse rounds: what is interpolated, what it costs, and that it changes nothing in the result."""

from __future__ import annotations

import pytest
import torch

import deqdiff_fast as dq
from deqdiff_fast.loop.coarse_grids import grid, interpolation


def test_doubled_grids_are_nested():
    for steps in (10, 20, 37, 50, 100, 1000):
        for count in (4, 8, 16):
            coarse, fine = grid(steps, count), grid(steps, 2 * count)
            assert coarse[0] == 0
            assert coarse[-1] == steps - 1
            assert set(coarse) <= set(fine)


def test_interpolation_is_exact_for_lines_and_at_its_own_timesteps():
    for steps, count in ((10, 4), (50, 16), (7, 20), (1, 3), (2, 1)):
        step = grid(steps, count)
        share = interpolation(step, steps, torch.ones(steps, dtype=torch.float64))
        at = torch.arange(steps, dtype=torch.float64)
        torch.testing.assert_close(share @ (3 - 2 * at[step]), 3 - 2 * at)
        torch.testing.assert_close(share[step], torch.eye(len(step), dtype=torch.float64))


def test_grids_that_are_worth_their_round():
    solver = dq.QuasiNewton(coarse=(4, 8, 16, 64))
    assert solver.coarse_grids(9, 9, False) == ()
    assert solver.coarse_grids(20, 20, False) == (4, 8)
    assert solver.coarse_grids(100, 100, False) == (4, 8, 16)
    assert solver.coarse_grids(1000, 1000, False) == (4, 8, 16, 64)
    assert solver.coarse_grids(20, 20, True) == ()
    assert solver.coarse_grids(30, 30, True) == (8,)
    assert solver.coarse_grids(50, 50, True) == (16,)
    assert solver.coarse_grids(100, 100, True) == (16,)
    assert solver.coarse_grids(1000, 1000, True) == (64,)
    assert dq.QuasiNewton(coarse=(4,)).coarse_grids(1000, 1000, True) == ()
    assert solver.coarse_grids(1000, 999, False) == ()
    assert dq.Picard().coarse_grids(100, 100, False) == ()


def test_grids_beside_a_draft_are_made_to_fit():
    solver = dq.Drafted(coarse=(8, 32))
    assert solver.coarse_grids(9, 9, False) == ()
    assert solver.coarse_grids(20, 20, False) == (8,)
    assert solver.coarse_grids(28, 28, False) == (8, 13)
    assert solver.coarse_grids(50, 50, False) == (8, 24)
    assert solver.coarse_grids(255, 255, False) == (8, 32)
    assert solver.coarse_grids(1000, 1000, False) == (8, 32, 64)
    assert solver.coarse_grids(50, 50, True) == (19,)
    assert solver.coarse_grids(1000, 1000, True) == (16, 64, 256, 256)
    assert solver.coarse_grids(256, 256, True) == (16, 64, 127)
    assert dq.Drafted(coarse=(4,)).coarse_grids(50, 50, False) == (4,)
    assert dq.Drafted(coarse=()).coarse_grids(50, 50, False) == ()
    assert dq.Drafted(coarse=()).coarse_grids(1000, 1000, True) == ()


@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_same_sample_for_fewer_evaluations(mixture, ddim, noise, relative_error, eta):
    model, schedule, start = mixture(), ddim(100, eta=eta), noise(3)

    def draws():
        return [torch.Generator().manual_seed(k) for k in range(3)]

    results = {}
    for coarse in ((), (4, 8, 16)):
        sampler = dq.DEQSampler(model, schedule, solver=dq.QuasiNewton(coarse=coarse))
        results[coarse] = sampler.sample(start, generator=draws())
    reference = sampler.serial(start, generator=draws())
    for out in results.values():
        assert out.converged.all()
        assert relative_error(out.sample, reference.sample).max() < 1e-2
    plain, nested = results[()].stats, results[(4, 8, 16)].stats
    assert plain.coarse_rounds == 0
    assert nested.coarse_rounds == (3 if eta == 0 else 1)
    assert nested.model_evals < 0.9 * plain.model_evals
    assert nested.rounds <= plain.rounds + 2
    assert len(nested.residual_trace) == nested.rounds


def test_every_evaluation_is_counted(mixture, ddim, noise):
    seen, model = [], mixture()

    def counted(x, t):
        seen.append(len(x))
        return model(x, t)

    out = dq.DEQSampler(counted, ddim(50), solver="quasi-newton", max_batch=7).sample(noise(2))
    assert out.stats.model_evals == sum(seen)
    assert out.stats.model_calls == len(seen)
    assert seen[:2] == [7, 3]  # five timesteps of two samples


def test_callbacks_see_coarse_rounds_and_can_stop_there(mixture, ddim, noise):
    rounds = []

    def stop(info):
        rounds.append((info.round, info.front.tolist()))
        return len(rounds) == 2

    out = dq.DEQSampler(mixture(), ddim(50), solver="quasi-newton").sample(noise(2), callback=stop)
    assert rounds == [(1, [0, 0]), (2, [0, 0])]
    assert out.stats.stop_reason == "callback"
    assert out.stats.rounds == 2
    assert not out.converged.any()
    assert out.sample.isfinite().all()


def test_a_given_trajectory_needs_no_coarse_rounds(mixture, ddim, noise):
    sampler = dq.DEQSampler(mixture(), ddim(50), solver="quasi-newton")
    first = sampler.sample(noise(2), return_trajectory=True)
    again = sampler.sample(noise(2), init_trajectory=first.trajectory)
    assert first.stats.coarse_rounds > 0
    assert again.stats.coarse_rounds == 0
    assert again.stats.rounds < first.stats.rounds


def test_few_rounds_leave_no_room_for_coarse_ones(mixture, ddim, noise):
    sampler = dq.DEQSampler(mixture(), ddim(50), solver="quasi-newton", max_rounds=3, on_failure="serial")
    out = sampler.sample(noise(1))
    assert out.stats.coarse_rounds == 0
    assert out.converged.all()


def test_a_model_that_fails_in_a_coarse_round_is_named(mixture, ddim, noise):
    model = mixture()

    def broken(x, t):
        out = model(x, t)
        out[t == 500] = float("nan")
        return out

    schedule = ddim(50)
    assert 500 in schedule.timesteps.tolist()
    with pytest.raises(dq.NonFiniteError, match="timestep 500"):
        dq.DEQSampler(broken, schedule, solver="quasi-newton").sample(noise(2))


@pytest.mark.parametrize("coarse", [[4], (0,), (2.5,), "auto"])
def test_bad_grids(coarse):
    with pytest.raises(ValueError, match="coarse: expected a tuple of ints"):
        dq.QuasiNewton(coarse=coarse)
