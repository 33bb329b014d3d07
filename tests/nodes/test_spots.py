"""Models that are not smooth in time: something is different at a few timesteps, or from one of them on."""

from __future__ import annotations

import pytest
import torch

import deqdiff_fast as dq
from deqdiff_fast.engine.checked_timesteps import AFTERWARDS, LEFT_OUT, CheckedTimesteps, needed
from deqdiff_fast.nodes.grid import error_weight, round_sizes
from deqdiff_fast.nodes.problem import NodeOutcome, Spots

pytestmark = pytest.mark.usefixtures("rows_are_known")

TOL = 1e-2


class Switched:
    """A model that predicts another noise at some of a schedule's timesteps, by `size` times its own."""

    def __init__(self, model, schedule, steps, size):
        self.model, self.times, self.size = model, schedule.timesteps[list(steps)], size
        self.seen = set()

    def __call__(self, x, t):
        self.seen.update(t.tolist())
        noise = self.model(x, t)
        other = noise.flip(-1) - noise
        there = torch.isin(t.double(), self.times.double()).view(-1, *[1] * (x.dim() - 1))
        return noise + self.size * there * other


def errors(model, schedule, noise, relative_error, **settings):
    sampler = dq.DEQSampler(model, schedule, **{"solver": "quasi-newton"} | settings)
    found = sampler.sample(noise)
    return found, relative_error(found.sample, sampler.serial(noise).sample)


@pytest.mark.parametrize("size", [0.1, 1.0])
@pytest.mark.parametrize(
    ("steps", "width", "every"), [(50, 1, 1), (50, 2, 11), (100, 1, 7), (100, 5, 19), (100, None, 23)]
)
def test_no_first_solve_ends_with_a_false_sample(mixture, ddim, noise, relative_error, steps, width, every, size):
    """width: of a bump, None for a switch that stays."""
    schedule, x, left = ddim(steps), noise(1), 0
    for first in range(1, steps, every):
        there = range(first, steps if width is None else min(first + width, steps))
        found, error = errors(Switched(mixture(), schedule, there, size), schedule, x, relative_error)
        assert bool(found.converged)
        assert error.item() < 1.5 * TOL, f"{first}: {error.item():.1e} after {found.stats.rounds} rounds"
        left += found.stats.rounds > found.stats.node_rounds
    assert left > 0 or size < 1, "none of these was left to rounds on all timesteps"


def test_a_long_chain_asks_what_could_matter_and_no_more(mixture, ddim, noise, relative_error):
    schedule = ddim(1000)
    model = Switched(mixture(), schedule, range(0), 0.0)
    sampler = dq.DEQSampler(model, schedule, solver="quasi-newton")
    checks = [sampler.sample(noise(1)).stats.check_evals for _ in range(3)]
    most = float(error_weight(schedule).sum()) / (LEFT_OUT * TOL)
    assert 100 < checks[0] < most
    assert max(checks[1:]) <= AFTERWARDS


def test_another_sampler_of_the_model_does_not_look_again(mixture, ddim, noise):
    model, schedule = mixture(), ddim(100)
    samples = [dq.DEQSampler(model, schedule, solver="quasi-newton").sample(noise(1, seed=k)) for k in range(2)]
    assert samples[0].stats.check_evals > 20
    assert samples[1].stats.check_evals <= AFTERWARDS
    stricter = dq.DEQSampler(model, schedule, solver="quasi-newton", tol=2e-3).sample(noise(1))
    assert stricter.stats.check_evals > AFTERWARDS, "less may be left out for a smaller tolerance"
    another = dq.DEQSampler(model, ddim(90), solver="quasi-newton").sample(noise(1))
    assert another.stats.check_evals > AFTERWARDS, "another schedule has other timesteps"


def test_another_eta_of_the_same_scheduler_is_looked_at_anew(mixture, noise):
    """What may be left out depends on it, and neither timesteps nor name do."""
    scheduler, model = pytest.importorskip("diffusers").DDIMScheduler(), mixture()
    checks = []
    for eta in (0.0, 0.5):
        schedule = dq.Schedule.from_diffusers(scheduler, 100, eta=eta)
        stats = dq.DEQSampler(model, schedule, solver="quasi-newton").sample(noise(1)).stats
        checks.append(stats.check_evals)
    assert min(checks) > AFTERWARDS + 5


def test_a_model_that_is_not_smooth_is_solved_on_all_timesteps_for_some_time(mixture, ddim, noise, relative_error):
    schedule, rounds = ddim(50), []
    model = Switched(mixture(), schedule, [1], 0.1)
    for k in range(4):
        found, error = errors(model, schedule, noise(1, seed=k), relative_error)
        assert error.item() < TOL
        rounds.append(found.stats.node_rounds)
    assert rounds[0] == len(round_sizes(50))
    assert rounds[1] == 0
    assert any(rounds[2:]), "it is never looked at again"


def test_a_switch_that_comes_later_is_found_in_time(mixture, ddim, noise, relative_error):
    """After the first solve only by the two timesteps that are asked, or by what they do at the nodes."""
    schedule, plain = ddim(50), mixture()
    model = Switched(plain, schedule, range(0), 1.0)
    sampler = dq.DEQSampler(model, schedule, solver="quasi-newton")
    sampler.sample(noise(1))
    model.times = schedule.timesteps[20:25]
    found = [sampler.sample(noise(1, seed=k)) for k in range(15)]
    assert any(one.stats.rounds > one.stats.node_rounds for one in found)


def test_full_certification_asks_nothing_beside(mixture, ddim, noise):
    sampler = dq.DEQSampler(mixture(), ddim(50), solver="quasi-newton", certify="full")
    assert sampler.sample(noise(1)).stats.check_evals == 0


@pytest.mark.parametrize("batch", [1, 3])
def test_stochastic_chains_of_smooth_models_pass(mixture, ddim, noise, batch):
    sampler = dq.DEQSampler(mixture(), ddim(200, 0.3), solver="quasi-newton")
    checks = [sampler.sample(noise(batch), generator=torch.Generator().manual_seed(0)).stats.check_evals for _ in "ab"]
    assert checks[0] > AFTERWARDS >= checks[1] > 0


def test_an_answer_at_a_spot_that_is_not_finite_is_named(mixture, ddim, noise):
    schedule = ddim(50)
    model = Switched(mixture(), schedule, [30], float("nan"))
    with pytest.raises(dq.NonFiniteError):
        dq.DEQSampler(model, schedule, solver="quasi-newton").sample(noise(1))


def test_what_is_left_out_cannot_matter():
    weight = torch.rand(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.01
    asked = needed(weight, 0.02)
    run = 0.0
    for w, here in zip(weight.tolist(), asked.tolist()):
        run = 0.0 if here else run + w
        assert run <= 0.02
    assert asked.sum() <= weight.sum() / 0.02


def test_spots_take_turns_over_timesteps_and_samples():
    known = CheckedTimesteps(torch.full((40,), 0.1, dtype=torch.float64))
    first = known.spots(TOL, 3)
    assert first == Spots(tuple(range(40)), 0)
    known.learn(first, outcome(rough=False), TOL)
    later = [known.spots(TOL, 3) for _ in range(40)]
    assert {spot for one in later for spot in one.timesteps} == set(range(40))
    assert {one.sample for one in later} == {0, 1, 2}


def outcome(rough):
    """Of a solve that has seen that."""
    return NodeOutcome(None, None, None, [True], torch.zeros(1), [], 0, rough=rough)  # type: ignore[arg-type]


def test_solves_do_not_depend_on_earlier_ones(mixture, ddim, noise):
    model, schedule = mixture(), ddim(100)
    dq.DEQSampler(model, schedule, solver="quasi-newton").sample(noise(1))
    known = dq.DEQSampler(model, schedule, solver="quasi-newton").sample(noise(1))
    fresh = dq.DEQSampler(mixture(), schedule, solver="quasi-newton").sample(noise(1))
    assert known.stats.rounds == fresh.stats.rounds
    assert (known.sample - fresh.sample).norm() <= 1e-5 * fresh.sample.norm()


def test_failures_are_waited_out_longer_and_longer():
    known, waits = CheckedTimesteps(torch.ones(20, dtype=torch.float64)), []
    for _ in range(3):
        known.learn(known.spots(TOL, 1), outcome(rough=True), TOL)
        waits.append(next(k for k in range(100) if not known.skip_nodes()))
    assert waits == sorted(set(waits))
    assert len(known.spots(TOL, 1).timesteps) == 20, "then the model is looked at anew"
