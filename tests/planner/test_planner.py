"""Planned solves: what is measured, chosen and known by others. Clocks are simulated; nothing here is timed."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from planner_cases import Machine, inputs, solve

import deqdiff_fast as dq
from deqdiff_fast.model.knowledge import signature_of
from deqdiff_fast.nodes.grid import round_sizes
from deqdiff_fast.planner.decide import decide
from deqdiff_fast.planner.round_model import Expectation
from deqdiff_fast.schedule.prior import prior_spectrum
from deqdiff_fast.schedule.spectral import SpectralSlope

pytestmark = pytest.mark.usefixtures("rows_are_known")


def test_warmup_measures_and_then_solves_in_parallel(machine, noise, relative_error):
    idle, sampler = machine(lambda n: 1.0, steps=100)
    assert "nothing was measured yet" in str(sampler.plan((3, 8, 8), batch=2))
    assert idle.sizes == [], "a plan calls no model"
    plan = sampler.warmup((3, 8, 8), batch=2)
    assert plan.chosen.window == 100
    assert str(plan) == str(sampler.plan((3, 8, 8), batch=2))
    out = solve(idle, sampler, noise(2))
    assert out.stats.plan.chosen.window == out.stats.window == 100
    assert out.stats.rounds == out.stats.node_rounds
    assert out.stats.solver == "quasi-newton"
    assert out.stats.stop_reason == "converged"
    assert relative_error(out.sample, sampler.serial(noise(2)).sample).max() < 1e-2
    assert out.stats.plan.chosen.seconds == pytest.approx(out.stats.rounds, rel=0.5)


@pytest.mark.parametrize(
    ("seconds", "spectrum", "expected"), [(1e-5, None, False), (1.0, None, True), (1e-5, "given", True)]
)
def test_solves_of_short_steps_do_without_the_prior(machine, noise, relative_error, seconds, spectrum, expected):
    """A change of basis takes longer there than the model does. A spectrum that was given is used all the same."""
    given = None if spectrum is None else prior_spectrum((3, 8, 8))
    device, sampler = machine(lambda n: seconds, steps=100, spectrum=given)
    sampler.warmup((3, 8, 8))
    system = sampler.planner.system(sampler.planner.workload(noise(1), None))
    assert isinstance(system.linear_model, SpectralSlope) == expected
    assert (system.basis is not None) == expected
    out = solve(device, sampler, noise(1))
    assert not out.stats.plan.serial
    assert relative_error(out.sample, sampler.serial(noise(1)).sample).max() < 1e-2


@pytest.mark.parametrize("max_batch", [None, 20])
def test_few_rows_are_padded_to_a_faster_call(machine, noise, relative_error, max_batch):
    """A device with a slow kernel for less than 16 rows: the prediction holds because they are padded."""
    device, sampler = machine(lambda n: 1.0 if n >= 16 else 3.0, steps=60, max_batch=max_batch)
    plan = sampler.warmup((3, 8, 8))
    assert plan.chosen.window > 1
    began = device.now
    out = solve_padded(device, sampler, noise(1))
    assert min(device.sizes) == 16
    assert out.stats.model_evals < sum(device.sizes), "what padding adds is not counted"
    assert device.now - began == pytest.approx(len(device.sizes))
    assert relative_error(out.sample, sampler.serial(noise(1)).sample).max() < 1e-2


def solve_padded(machine, sampler, start):
    machine.sizes.clear()
    return sampler.sample(start)


def test_the_first_call_of_a_size_which_prepares_is_not_what_the_size_costs(machine):
    """Ten seconds are more than a warm-up gives to a size: it is called once more all the same."""
    seen = set()

    def cost(rows):
        first, _ = rows not in seen, seen.add(rows)
        return 10.0 if first else 1.0

    _, sampler = machine(cost, steps=60)
    plan = sampler.warmup((3, 8, 8))
    assert len(plan.measured) > 1
    assert [seconds for _, seconds in plan.measured] == [1.0] * len(plan.measured)


def test_warmup_on_a_busy_device_stays_serial_and_stops_measuring(machine, noise):
    busy, sampler = machine(float)
    assert sampler.warmup((3, 8, 8)).serial
    assert max(busy.sizes) <= 8, "with 1.9 T evaluations a few rows more could have paid"
    out = solve(busy, sampler, noise(1))
    assert (out.stats.solver, out.stats.window, out.stats.stop_reason) == ("serial", 1, "serial")
    assert out.stats.rounds == out.stats.model_evals == 50
    assert torch.equal(out.sample, sampler.serial(noise(1)).sample)
    assert out.converged.all()


def test_the_first_sample_measures_itself_and_goes_on_in_parallel(machine, noise, relative_error):
    idle, sampler = machine(lambda n: 1.0, steps=200)
    out = solve(idle, sampler, noise(1))
    assert idle.sizes[:4] == [1, 1, 1, 1]
    assert out.stats.stop_reason == "converged"
    assert out.stats.rounds < 100
    assert out.stats.window > 1
    assert relative_error(out.sample, sampler.serial(noise(1)).sample).max() < 1e-2
    more = [solve(idle, sampler, noise(1, seed=k)).stats.rounds for k in range(12)]
    assert more[-1] <= 20, "what was saved pays for measuring larger batches"


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_taking_over_a_stochastic_chain(mixture, ddim, noise, relative_error, eta):
    idle = Machine(mixture(), lambda n: 1.0)
    sampler = dq.DEQSampler(idle, ddim(100, eta), tol=1e-5)
    sampler.planner.clock = idle.clock
    draws = [torch.Generator().manual_seed(4) for _ in range(2)]
    out = solve(idle, sampler, noise(2), generator=draws[0], return_trajectory=True)
    expected = sampler.serial(noise(2), generator=draws[1], return_trajectory=True)
    assert out.stats.window > 1
    assert relative_error(out.sample, expected.sample).max() < 1e-4
    assert relative_error(out.trajectory.transpose(0, 1), expected.trajectory.transpose(0, 1)).max() < 1e-4


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
def test_short_chains(machine, noise, relative_error, steps):
    device, sampler = machine(lambda n: 1.0, steps=steps, tol=1e-5)
    reference = sampler.serial(noise(2)).sample
    for warm in (False, True):
        if warm:
            sampler.warmup((3, 8, 8), batch=2)
        runs = [solve(device, sampler, noise(2)) for _ in range(40)]
        assert all(relative_error(out.sample, reference).max() < 1e-5 for out in runs)
        assert all(out.stats.plan is not None and out.stats.rounds <= steps for out in runs)


def test_the_first_samples_of_a_busy_device_cost_a_few_percent_more(machine, noise):
    busy, sampler = machine(float)
    spent = [solve(busy, sampler, noise(2, seed=k)).stats.model_evals for k in range(10)]
    assert sum(spent) <= 1.05 * 10 * 100
    assert spent[-1] == 100
    assert sampler.plan((3, 8, 8), batch=2).serial


def test_rounds_on_nodes_may_need_less_than_the_chain(machine, noise, relative_error):
    """On a device that rows keep busy a long chain is still faster by rounds: most timesteps are never asked."""
    device, sampler = machine(float, steps=1000, tol=5e-2)
    nodes = round_sizes(1000)
    rows = inputs({1: 1.0, 128: 128.0}, 1000, expect=Expectation(1000, nodes=nodes), nodes=nodes)
    assert decide(rows).chosen.window == 1000
    plan = sampler.warmup((3, 8, 8))
    assert plan.chosen.window == 1000
    assert plan.chosen.effort.evaluations < 0.5
    began = device.now
    out = solve(device, sampler, noise(1))
    assert device.now - began < 0.5 * 1000
    assert device.now - began == pytest.approx(plan.chosen.seconds, rel=0.25)
    assert relative_error(out.sample, sampler.serial(noise(1)).sample).max() < 5e-2


def test_the_callers_choice_is_honoured(mixture, ddim, noise):
    for options in ({"solver": "quasi-newton"}, {"solver": dq.QuasiNewton()}, {"window": 50}):
        sampler = dq.DEQSampler(mixture(), ddim(50), **options)
        out = sampler.sample(noise(1))
        assert (out.stats.solver, out.stats.window, out.stats.plan) == ("quasi-newton", 50, None)
        with pytest.raises(ValueError, match="solver, window: expected 'auto' for both"):
            sampler.plan((3, 8, 8))
        assert sampler.warmup((3, 8, 8)) is None


def test_what_one_sampler_learns_another_knows(machine, ddim):
    device, sampler = machine(lambda n: 1.0)
    plan = sampler.warmup((3, 8, 8))
    device.sizes.clear()
    twin, longer = dq.DEQSampler(device, ddim(50)), dq.DEQSampler(device, ddim(60))
    assert str(twin.plan((3, 8, 8))) == str(plan)
    assert not longer.plan((3, 8, 8)).serial, "calls cost the same, whatever the schedule"
    for other in ({"batch": 3}, {"dtype": torch.float64}, {"model_kwargs": {"c": 1}}):
        assert "nothing was measured" in str(twin.plan((3, 8, 8), **other))
    assert device.sizes == []


def test_signature():
    x = torch.zeros(2, 3)
    same = [{"a": torch.zeros(2, 5), "b": "x"}, {"a": torch.ones(2, 5), "b": "x"}]
    assert signature_of(x, same[0]) == signature_of(torch.ones(5, 3), {"a": torch.ones(5, 5), "b": "x"})
    assert signature_of(x, same[0]) == signature_of(x, same[1])
    for other in (None, {"a": torch.zeros(2, 6), "b": "x"}, {"a": torch.zeros(2, 5), "b": "y"}, {"a": 1.0, "b": "x"}):
        assert signature_of(x, other) != signature_of(x, same[0])


def test_nothing_keeps_a_model_alive(machine, noise):
    device, sampler = machine(lambda n: 1.0)
    sampler.warmup((3, 8, 8))
    sampler.sample(noise(1))
    gone = weakref.ref(device)
    del device, sampler
    gc.collect()
    assert gone() is None


def test_gradients_and_warm_starts_of_planned_solves(machine, noise, relative_error):
    for cost in (float, lambda n: 1.0):
        _, sampler = machine(cost, tol=1e-5)
        sampler.warmup((3, 8, 8))
        start = noise(1).requires_grad_(True)
        out = sampler.sample(start, return_trajectory=True)
        (grad,) = torch.autograd.grad(out.sample.sum(), start)
        assert grad.isfinite().all()
        assert grad.norm() > 0
        with torch.no_grad():
            again = sampler.sample(start, init_trajectory=out.trajectory)
        assert relative_error(again.sample, out.sample.detach()).max() < 1e-4


def test_bad_input_and_no_samples(machine, noise):
    _, sampler = machine(float)
    for shape in (3, (), (3, 0), (3, -1), (3.0,), "38"):
        with pytest.raises(ValueError, match="shape: expected that of one sample"):
            sampler.plan(shape)
    with pytest.raises(ValueError, match="batch: expected an int >= 1"):
        sampler.warmup((3, 8, 8), batch=0)
    with pytest.raises(TypeError, match="model_kwargs: expected a dict"):
        sampler.warmup((3, 8, 8), model_kwargs=[1])
    assert sampler.sample(noise(0)).sample.shape == (0, 3, 8, 8)
