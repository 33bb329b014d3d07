"""What a solve on nodes tells: statistics, trajectories, callbacks, failures."""

from __future__ import annotations

import pytest
import torch

import deqdiff_fast as dq

pytestmark = pytest.mark.usefixtures("rows_are_known")

TOL = 1e-2


@pytest.fixture
def sampler(mixture, ddim):
    def make(steps=50, model=None, **settings):
        return dq.DEQSampler(model or mixture(), ddim(steps), solver="quasi-newton", **settings)

    return make


@pytest.mark.parametrize("steps", [16, 50, 100])
@pytest.mark.parametrize("seed", range(3))
def test_the_error_estimate_is_of_the_true_size(sampler, noise, relative_error, steps, seed):
    solver, x = sampler(steps), noise(3, seed=seed)
    found = solver.sample(x)
    estimate, error = found.stats.error_estimate, relative_error(found.sample, solver.serial(x).sample)
    assert estimate.shape == (3,)
    assert estimate.dtype == torch.float64
    assert bool((estimate <= TOL).all())
    if found.stats.node_rounds < found.stats.rounds:  # one of them was left to rounds on all timesteps
        assert bool((error <= TOL).all())
        return
    assert bool(((estimate > error / 1.5) | (error < TOL / 10)).all())
    assert bool((estimate < 100 * error.clamp_min(1e-5)).all())


def test_no_error_estimate_is_zero(mixture, ddim, noise, relative_error):
    solver, x = dq.DEQSampler(mixture(), ddim(100, 0.5), solver="quasi-newton"), noise(3)
    found = solver.sample(x, generator=torch.Generator().manual_seed(1))
    error = relative_error(found.sample, solver.serial(x, generator=torch.Generator().manual_seed(1)).sample)
    assert error.min() > 1e-5
    assert bool((found.stats.error_estimate > error / 3).all())


def test_what_was_finished_serially_is_evaluated_and_exact(sampler, noise):
    stats = sampler(max_rounds=3).sample(noise(2)).stats
    assert stats.finished_serially > 0
    assert bool(stats.error_estimate.isfinite().all())
    assert stats.timesteps_evaluated == 1


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_shortest_chains_converge(sampler, noise, steps):
    found = sampler(steps, on_failure="raise").sample(noise(2))
    assert bool(found.converged.all())
    assert bool(found.stats.error_estimate.isfinite().all())


def test_the_shortest_chains_are_right_anyway(sampler, noise, relative_error):
    for steps in (1, 2, 3, 4):
        solver = sampler(steps, on_failure="warn" if steps > 3 else "serial")
        assert relative_error(solver.sample(noise(2)).sample, solver.serial(noise(2)).sample).max() < 1e-3


@pytest.mark.parametrize("kind", ["certify", "trajectory"])
@pytest.mark.parametrize("steps", [50, 200])
def test_every_timestep_is_evaluated_where_that_is_asked_for(mixture, sampler, noise, relative_error, kind, steps):
    given, seen = mixture(), set()

    def model(x, t):
        seen.update(t.tolist())
        return given(x, t)

    solver = sampler(steps, model=model, **({"certify": "full"} if kind == "certify" else {}))
    found = solver.sample(noise(2), return_trajectory=kind == "trajectory")
    assert len(seen) == steps
    assert found.stats.timesteps_evaluated == 1
    assert 0 < found.stats.node_rounds < found.stats.rounds
    assert bool(found.converged.all())
    exact = solver.serial(noise(2), return_trajectory=True).trajectory
    assert relative_error(found.sample, exact[-1]).max() < TOL
    assert (found.trajectory is None) == (kind == "certify")
    if found.trajectory is not None:
        assert found.trajectory.shape == exact.shape
        assert max(float(relative_error(a, b).max()) for a, b in zip(found.trajectory, exact)) < 2 * TOL
        assert torch.equal(found.trajectory[-1], found.sample)


def test_estimates_leave_timesteps_out(mixture, sampler, noise):
    given, seen = mixture(), set()

    def model(x, t):
        seen.update(t.tolist())
        return given(x, t)

    solver = sampler(1000, model=model)
    solver.sample(noise(2))  # looks at the model for the first time
    seen.clear()
    stats = solver.sample(noise(2)).stats
    assert stats.timesteps_evaluated < 0.2
    assert len(seen) == round(1000 * stats.timesteps_evaluated)


def test_a_callback_sees_every_round(sampler, noise, relative_error):
    rounds, errors, exact = [], [], sampler().serial(noise(2)).sample

    def callback(info):
        rounds.append(info.round)
        errors.append(float(relative_error(info.sample(), exact).max()))
        assert info.num_steps == 50
        assert info.front.shape == info.residual.shape == (2,)
        assert info.preview().shape == (2, 3, 8, 8)
        torch.testing.assert_close(info.state(0), noise(2))
        assert torch.equal(info.state(50), info.sample())
        assert bool(info.denoised(25).isfinite().all())

    found, plain = sampler().sample(noise(2), callback=callback), sampler().sample(noise(2))
    assert rounds == list(range(1, found.stats.rounds + 1))
    assert errors[-1] < TOL < errors[0]
    assert relative_error(found.sample, plain.sample).max() < 1e-4  # being looked at changes nothing
    assert found.stats.residual_trace.shape == (found.stats.rounds, 2)
    assert found.stats.rounds == plain.stats.rounds
    assert found.stats.model_evals == plain.stats.model_evals


@pytest.mark.parametrize("last", [1, 2, 4, 6])
def test_a_callback_stops(sampler, noise, last):
    found = sampler().sample(noise(2), callback=lambda info: info.round == last)
    assert found.stats.stop_reason == "callback"
    assert found.stats.rounds == found.stats.node_rounds == last
    assert found.stats.finished_serially == 0


@pytest.mark.parametrize("last", [1, 2, 4])
def test_what_a_callback_stopped_has_not_converged(sampler, noise, relative_error, last):
    found = sampler().sample(noise(2), callback=lambda info: info.round == last)
    assert relative_error(found.sample, sampler().serial(noise(2)).sample).max() > TOL
    assert not bool(found.converged.any())


def test_what_is_final_stays_final(sampler, noise):
    fronts = []
    sampler(tol=1e-4).sample(noise(2), callback=lambda info: fronts.append(info.front))
    assert bool((torch.stack(fronts).diff(dim=0) >= 0).all())


def test_progress_is_shown(sampler, noise, capfd):
    found = sampler().sample(noise(2), progress=True)
    told = capfd.readouterr().err
    assert "100/100" in told
    assert f"round={found.stats.rounds}" in told


@pytest.mark.parametrize("step", [0, 49, "second", "late"])
def test_a_model_that_breaks_is_named_with_its_timestep(mixture, ddim, sampler, noise, step):
    given, asked, schedule = mixture(), [], ddim(50)
    sampler(model=lambda x, t: asked.append(t.tolist()) or given(x, t)).sample(noise(1))
    first = set(asked[0])
    if step in ("second", "late"):  # a timestep that was not asked in the round before
        later = asked[1] if step == "second" else asked[2]
        step = int((schedule.timesteps == sorted(set(later) - first)[0]).nonzero())
    bad = int(schedule.timesteps[step])

    def model(x, t):
        return torch.where((t == bad).view(-1, 1, 1, 1), float("nan"), given(x, t))

    with pytest.raises(dq.NonFiniteError, match=rf"NaN or Inf at timestep {bad} \(step {step} of 50\)"):
        sampler(model=model).sample(noise(2))


def test_one_broken_sample_is_named(mixture, sampler, noise):
    given = mixture()

    def model(x, t):
        return torch.where(x.flatten(1)[:, :1].view(-1, 1, 1, 1) > 50, float("inf"), given(x, t))

    x = noise(3)
    x[1, 0, 0, 0] = 100.0
    with pytest.raises(dq.NonFiniteError, match="sample 1"):
        sampler(model=model).sample(x)


def test_rounds_that_run_out_raise_or_warn(sampler, noise):
    with pytest.raises(dq.NotConvergedError, match="2 of 2 samples did not converge in 3 rounds"):
        sampler(max_rounds=3, on_failure="raise").sample(noise(2))
    with pytest.warns(dq.ConvergenceWarning):
        found = sampler(max_rounds=3, on_failure="warn").sample(noise(2))
    assert not bool(found.converged.any())
    assert found.stats.rounds == 3
