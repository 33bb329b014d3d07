"""What becomes dearer or cheaper than it was planned to be, and memory that is not there. Clocks are simulated."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from planner_cases import solve

import deqdiff_fast as dq
from deqdiff_fast.planner import planner as planning
from deqdiff_fast.planner.free_memory import free_bytes

pytestmark = pytest.mark.usefixtures("rows_are_known")


def test_a_solve_that_becomes_dear_is_finished_serially(machine, noise, relative_error):
    costs = [1.0]
    device, sampler = machine(lambda n: 1.0 if n <= 2 else costs[0], tol=1e-5)
    assert sampler.warmup((3, 8, 8), batch=2).chosen.window == 50
    costs[0], began = 40.0, device.now
    out = solve(device, sampler, noise(2))
    assert out.stats.stop_reason == "replanned"
    assert (out.stats.node_rounds, out.stats.finished_serially) == (2, 50), "rounds on nodes leave no state final"
    assert device.now - began == 2 * 40 + 50
    assert (out.stats.timesteps_evaluated, out.stats.error_estimate.tolist()) == (1.0, [0.0, 0.0])
    assert out.converged.all()
    assert relative_error(out.sample, sampler.serial(noise(2)).sample).max() < 1e-5
    assert sampler.plan((3, 8, 8), batch=2).serial, "and the next one starts that way"


def test_what_was_given_up_is_not_tried_again(machine, noise):
    """Not even where measurements have cost so much that nothing is left for a plan."""
    costs = [1.0]
    device, sampler = machine(lambda n: 1.0 if n <= 2 else costs[0], tol=1e-5)
    sampler.warmup((3, 8, 8), batch=2)
    costs[0] = 40.0
    sampler.planner.workload(noise(2), None).stats.measure_budget = -1e6
    reasons = [solve(device, sampler, noise(2, seed=k)).stats.stop_reason for k in range(3)]
    assert reasons == ["replanned", "serial", "serial"]


@pytest.mark.parametrize("nodes", [True, False])
def test_rounds_on_nodes_say_nothing_of_windows(machine, noise, nodes):
    _, sampler = machine(lambda n: 1.0)
    sampler = sampler._with(replace(sampler.options, solver=dq.QuasiNewton(nodes=nodes)))
    workload = sampler.planner.workload(noise(2), None)
    workload.stats.corrections[True] = 5.0
    correction = sampler.planner.inputs(workload).correction
    assert (correction(50), correction(8)) == (5.0, 1.0 if nodes else 5.0)


def test_a_window_that_becomes_dear_is_finished_serially(machine, noise, relative_error):
    costs = [1.0]
    device, sampler = machine(lambda n: 1.0 if n <= 2 else costs[0], tol=1e-5)
    sampler = sampler._with(replace(sampler.options, solver=dq.QuasiNewton(nodes=False)))
    sampler.warmup((3, 8, 8), batch=2)
    costs[0] = 40.0
    out = solve(device, sampler, noise(2))
    assert out.stats.stop_reason == "replanned"
    assert out.stats.node_rounds == 0
    assert 0 < out.stats.finished_serially < 50
    assert relative_error(out.sample, sampler.serial(noise(2)).sample).max() < 1e-5


def test_rounds_on_nodes_that_do_not_suffice_are_not_followed_by_dear_ones(machine, noise, relative_error):
    """Calls cost their rows: nodes are cheap for a long chain, but two rounds on all timesteps cost twice the chain."""
    device, sampler = machine(float, steps=500, tol=1e-5)
    assert sampler.warmup((3, 8, 8)).serial, "it was tried, to no avail"
    planner, workload = sampler.planner, sampler.planner.workload(noise(1), None)
    workload.stats.plan, workload.stats.age = planner.forced(workload, 500), 0
    workload.stats.measure_budget, began = -1.0, device.now
    out = solve(device, sampler, noise(1))
    assert out.stats.stop_reason == "replanned", "the mixture takes full rounds at that tolerance"
    assert 0 < out.stats.rounds == out.stats.node_rounds
    assert out.stats.finished_serially == 500
    assert device.now - began - out.stats.check_evals < 1.5 * 500
    assert relative_error(out.sample, sampler.serial(noise(1)).sample).max() < 1e-5
    assert sampler.plan((3, 8, 8)).serial, "and that is remembered"


def test_giving_up_is_no_failure(machine, noise):
    costs = [1.0]
    device, sampler = machine(lambda n: 1.0 if n <= 2 else costs[0], on_failure="raise")
    sampler.warmup((3, 8, 8), batch=2)
    costs[0] = 40.0
    out = solve(device, sampler, noise(2), callback=lambda info: int(info.front.min()) >= 20)
    assert out.stats.stop_reason == "callback"
    assert not out.converged.any()
    assert solve(device, sampler, noise(2)).converged.all()


def test_reality_corrects_the_predictions(machine, noise):
    device, sampler = machine(lambda n: 1.0 if n <= 2 else 1.0 + slow[0])
    slow = [0.0]
    sampler.warmup((3, 8, 8), batch=2)
    promised = sampler.plan((3, 8, 8), batch=2).chosen
    slow[0] = 1.0
    for k in range(20):
        solve(device, sampler, noise(2, seed=k))
    now = sampler.plan((3, 8, 8), batch=2).chosen
    began = device.now
    taken = solve(device, sampler, noise(2)).stats
    assert min(now.window, promised.window, taken.window) >= 32, "the mixture takes 6 rounds with either"
    assert now.seconds == pytest.approx(device.now - began, rel=0.25)
    assert now.seconds > 1.4 * promised.seconds


def test_nothing_is_learned_from_a_solve_that_takes_over_timed_steps(machine, noise, relative_error):
    """It makes room for them and takes them over, and what is left is no solve from the noise."""
    extra = [0.0]
    device, sampler = machine(lambda n: 1.0 + extra[0] * (n > 2), tol=1e-5)
    sampler = sampler._with(replace(sampler.options, solver=dq.QuasiNewton(nodes=False)))
    sampler.warmup((3, 8, 8), batch=2)
    stats = sampler.planner.workload(noise(2), None).stats
    known, stats.unchecked, extra[0] = dict(stats.corrections), planning.REFRESH, 3.0
    out = solve(device, sampler, noise(2))
    assert device.sizes[:4] == [2, 2, 2, 2], "steps of the serial chain were timed again"
    assert not out.stats.plan.serial
    assert not out.stats.finished_serially
    assert relative_error(out.sample, sampler.serial(noise(2)).sample).max() < 1e-5
    assert stats.corrections == known
    assert not stats.suspect
    solve(device, sampler, noise(2, seed=1))
    assert stats.suspect, "the next one is a surprise"


def test_a_chain_that_is_mostly_made_when_it_was_timed_is_finished_serially(machine, noise):
    """Rounds would take longer than the steps that are left."""
    device, sampler = machine(lambda n: 1e-4, tol=1e-5)
    sampler = sampler._with(replace(sampler.options, solver=dq.QuasiNewton(nodes=False)))
    assert not sampler.warmup((3, 8, 8), batch=2).serial
    stats = sampler.planner.workload(noise(2), None).stats
    stats.plan = replace(stats.plan, chosen=replace(stats.plan.chosen, seconds=40e-4))
    stats.unchecked, stats.measure_budget = planning.REFRESH, -1.0  # no new plan
    out = solve(device, sampler, noise(2))
    assert device.sizes == [2] * 50
    assert (out.stats.stop_reason, out.stats.finished_serially) == ("serial", 50)


def test_a_slower_machine_changes_no_plan(machine, noise):
    speed = [1.0]
    device, sampler = machine(lambda n: speed[0] * (1 + n / 40))
    first = sampler.warmup((3, 8, 8)).chosen.window
    assert first > 1
    speed[0] = 3.0
    used = [solve(device, sampler, noise(1, seed=k)).stats.window for k in range(12)]
    assert set(used[4:]) != {1}, "all calls have become slower, not only those of many rows"
    speed[0] = 1.0
    used = [solve(device, sampler, noise(1, seed=k)).stats.window for k in range(12)]
    assert used[-1] > 1


def test_free_memory_decides_the_window(machine, noise, relative_error, monkeypatch):
    assert free_bytes(torch.device("cpu")) > 1 << 20
    assert free_bytes(torch.device("meta")) is None
    device, sampler = machine(lambda n: 1.0)
    chain = 4 * 192 * (51 + 50)  # the states and the predictions are needed in any case
    monkeypatch.setattr(planning, "usable_bytes", lambda where: 2.5 * chain)
    window = sampler.warmup((3, 8, 8)).chosen.window
    assert 1 < window < 20
    out = solve(device, sampler, noise(1))
    assert out.stats.window == window
    assert relative_error(out.sample, sampler.serial(noise(1)).sample).max() < 1e-2
    monkeypatch.setattr(planning, "usable_bytes", lambda where: 0.0)
    device, sampler = machine(lambda n: 1.0)
    assert sampler.warmup((3, 8, 8)).serial


def test_running_out_of_memory_while_measuring(machine, noise):
    def cost(n):
        if n > 12:
            raise torch.OutOfMemoryError("full")
        return 1.0

    device, sampler = machine(cost)
    plan = sampler.warmup((3, 8, 8))
    assert plan.chosen.window > 1
    device.sizes.clear()
    out = sampler.sample(noise(1))
    assert out.converged.all()
    assert max(device.sizes) <= 12
