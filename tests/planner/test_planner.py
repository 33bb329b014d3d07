"""The plan: a pure choice between predictions, made from measurements. Clocks are simulated; nothing here is timed."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch

import deqdiff_fast as dq
from deqdiff_fast.model.knowledge import signature_of
from deqdiff_fast.plan import RoundEstimate
from deqdiff_fast.planner import planner as planning
from deqdiff_fast.planner.cost_curve import Curve
from deqdiff_fast.planner.decide import PlannerInputs, decide, predict, promising, rows_of_rounds, windows
from deqdiff_fast.planner.free_memory import free_bytes
from deqdiff_fast.planner.monitor import give_up, work_left
from deqdiff_fast.planner.round_model import Expectation

pytestmark = pytest.mark.usefixtures("rows_are_known")

IDLE, BUSY = {1: 1.0, 128: 1.0}, {1: 1.0, 128: 128.0}  # devices on which more rows are free, and on which they are not


def inputs(points=IDLE, steps=100, batch=1, **more):
    calls = Curve(points)
    more.setdefault("expect", lambda window: Expectation(steps)(window, batch))
    return PlannerInputs(steps=steps, batch=batch, step=calls(batch), calls=calls, **more)


def test_an_idle_device_solves_everything_at_once():
    plan = decide(inputs(IDLE))
    assert plan.chosen.window == 100
    assert plan.chosen.seconds == pytest.approx(plan.chosen.effort.rounds)
    assert plan.serial_seconds == pytest.approx(100)
    assert "all 100 timesteps at a time" in str(plan)
    assert f"{100 / plan.chosen.seconds:.2f} times as fast as the serial chain" in str(plan)


@pytest.mark.parametrize("batch", [1, 4, 16])
@pytest.mark.parametrize("steps", [1, 2, 20, 1000])
def test_a_busy_device_stays_serial(batch, steps):
    plan = decide(inputs({1: 1.0, 20000: 20000.0}, steps, batch))
    assert plan.serial
    assert plan.chosen.seconds == pytest.approx(steps * batch)


def test_a_device_that_fills_up_gets_a_window():
    filling = {1: 1.0, 8: 1.0, 16: 2.0, 128: 16.0}
    plan = decide(inputs(filling))
    timed = {c.window: c.seconds for c in plan.candidates}
    assert 1 < plan.chosen.window < 100
    assert plan.chosen.seconds == min(timed.values())
    assert all(c.seconds == pytest.approx(predict(inputs(filling), c.window, c.effort)[0])
               for c in plan.candidates[1:])  # fmt: skip


def test_memory_limits_the_window():
    plan = decide(inputs(IDLE, fits=lambda window: window <= 20))
    assert plan.chosen.window == 16
    assert "does not fit in the free memory" in str(plan)


def test_calls_are_cut_where_pieces_are_cheaper_and_where_they_must_be():
    cached = {1: 1.0, 16: 1.0, 128: 64.0}  # beyond 16 rows the activations leave the cache
    assert decide(inputs(cached)).chosen.piece == 16
    assert decide(inputs(IDLE, limit=32)).chosen.piece == 32
    assert decide(inputs(IDLE)).chosen.piece == 100


def test_what_is_not_known_is_not_tried():
    plan = decide(PlannerInputs(100, 1, None, None, Expectation(100)))
    assert plan.serial
    assert "nothing was measured yet" in str(plan)
    few = decide(inputs({1: 1.0, 2: 1.0}))
    assert 2 < few.chosen.window <= 8
    assert next(c for c in few.candidates if c.window == 100).seconds is None


def test_max_rounds_rules_solves_out():
    assert decide(inputs(IDLE, max_rounds=3)).serial
    assert decide(inputs(IDLE, max_rounds=20)).chosen.window == 100


def test_corrections_count():
    assert decide(inputs(IDLE, correction=lambda window: 1e3 if window == 100 else 1.0)).chosen.window == 64
    assert decide(inputs(IDLE, correction=lambda window: 1e3)).serial


def test_a_choice_is_kept_until_another_is_clearly_better():
    flat = {"points": {1: 1.0, 100: 1.3}, "correction": lambda window: 1.15 if window == 100 else 1.0}
    plan = decide(inputs(**flat))
    second = min((c for c in plan.candidates[1:] if c != plan.chosen), key=lambda c: c.seconds)
    assert plan.chosen.seconds > 0.95 * second.seconds, "the test needs two that are alike"
    assert decide(inputs(**flat, previous=second.window)).chosen.window == second.window
    assert decide(inputs(**flat, previous=2)).chosen.window == plan.chosen.window
    cost = 100 / decide(inputs(IDLE)).chosen.effort.rounds  # a round as dear as brings the full solve to a draw
    near = {1: 1.0, 2: 0.97 * cost, 100: 0.97 * cost}
    full_only = {"fits": lambda window: window == 100}
    assert decide(inputs(near, **full_only)).serial
    assert decide(inputs(near, **full_only, previous=100)).chosen.window == 100


def test_only_sizes_that_may_change_the_choice_are_promising():
    assert promising(inputs({1: 1.0}), [2, 64]) == [2, 64]
    assert promising(inputs({1: 1.0, 8: 8.0}), [16]) == []
    assert promising(inputs({1: 1.0, 8: 1.0}), [16, 64]) == [16, 64]


def test_curve():
    curve = Curve({4: 3.0, 1: 1.0, 8: 2.5})
    assert [curve(n) for n in (1, 2.5, 4, 6, 8)] == [1.0, 1.75, 2.5, 2.5, 2.5], "four rows are padded to eight"
    assert curve(16) == pytest.approx(2.5 + 8 * 2.5 / 8 / 4)
    assert Curve({2: 1.0})(6) == pytest.approx(3.0)
    assert curve.in_pieces(20, 8) == pytest.approx(2.5 + 2.5 + 2.5)
    for bad in ({}, {0: 1.0}, {1: -1.0}, {1: float("inf")}):
        with pytest.raises(ValueError, match="points: expected"):
            Curve(bad)


def test_sizes_that_are_worth_padding_to():
    assert Curve({4: 3.0, 1: 1.0, 8: 2.5}).padding() == ((4, 8),)
    assert Curve({1: 1.0, 2: 0.8, 4: 0.9, 8: 1.2}).padding() == ((1, 2),)
    assert Curve({1: 2.0, 2: 1.0, 4: 2.0, 8: 1.0}).padding() == ((1, 2), (4, 8))
    assert Curve({1: 1.0, 2: 2.0, 4: 1.5, 8: 1.0, 16: 0.98}).padding() == ((2, 8),), "not for two hundredths"
    assert Curve({1: 5.0, 2: 4.0, 4: 3.0, 8: 1.0}).padding() == ((1, 8),)
    assert Curve({1: 1.0, 2: 1.0, 4: 3.0}).padding() == ()


@pytest.mark.parametrize("steps", [1, 2, 3, 20, 100, 1000])
def test_expectations_are_possible(steps):
    expect = Expectation(steps)
    for window in sorted({1, *windows(steps), steps}):
        rounds, evaluations = expect(window)
        assert steps / window <= rounds * 1.001
        assert rounds <= steps
        assert 1 <= evaluations <= window * 1.001 or window == 1
        rows = rows_of_rounds(expect(window), window, steps, 3)
        assert sum(count for count, _ in rows) == pytest.approx(rounds)
        assert sum(count * n for count, n in rows) == pytest.approx(3 * steps * evaluations, rel=0.1)
        assert all(0 < n <= 3 * window * 1.001 for _, n in rows)


def test_there_is_one_window():
    """Three candidates: the serial chain, the best possible window and all timesteps."""
    for steps, more in ((100, {}), (1000, {"batch": 4}), (50, {"fits": lambda window: window <= 20})):
        filling = inputs({1: 1.0, 8: 1.0, 16: 2.0, 128: 16.0, 1000: 125.0}, steps, **more)
        widths = [c.window for c in decide(filling).candidates]
        assert widths == [1, widths[1], steps]
        alone = [decide(replace(filling, fits=lambda w, only=only: w == only)).candidates[1] for only in windows(steps)]
        possible = [c for c in alone if c.window in windows(steps) and c.seconds is not None and filling.fits(c.window)]
        assert widths[1] == min(possible, key=lambda c: c.seconds).window
    assert [c.window for c in decide(inputs(IDLE, 2)).candidates] == [1, 2]
    assert [c.window for c in decide(inputs(IDLE, 1)).candidates] == [1]


def test_expectations_learn():
    expect = Expectation(100)
    before = expect(100), expect(50), expect(100, 1, True)
    expect.learn(100, 1, RoundEstimate(2 * before[0].rounds, before[0].evaluations))
    assert expect(100).rounds == pytest.approx(2 * before[0].rounds)
    assert before[1].rounds < expect(50).rounds < 2 * before[1].rounds
    expect.learn(50, 1, expect.prior(50))
    assert expect(20) == pytest.approx(expect.prior(20)), "what holds for a window holds for another"
    expect.learn(100, 1, RoundEstimate(3.0, 3.0), warm=True)
    assert expect(100, 1, True) == pytest.approx((3.0, 3.0))
    assert expect(100).rounds == pytest.approx(2 * before[0].rounds)
    assert Expectation(100, 1e-5)(100).evaluations > 1.5 * before[0].evaluations


def test_work_left():
    effort = RoundEstimate(10.0, 4.0)
    left = [work_left(done, effort, 0, 100, 100) for done in range(1, 10)]
    assert all(after > 0 for after in left)
    assert left[0] < 9, "later rounds have fewer rows"
    assert work_left(15, effort, 10, 100, 100) == 6, "as long again as it is overdue"
    assert work_left(5, RoundEstimate(40.0, 1.6), 10, 100, 4) == 45, "a window goes on as it went"
    assert work_left(50, effort, 98, 100, 100) == 2
    assert give_up(10, 1.0, 5, 1.0)
    assert not give_up(5, 1.0, 5, 1.0)


class Machine:
    """A model and a clock: a call of n rows takes `cost(n)` seconds of that clock, and everything else no time."""

    def __init__(self, model, cost):
        self.model, self.cost, self.now, self.sizes = model, cost, 0.0, []

    def __call__(self, x, t, **kwargs):
        self.sizes.append(len(x))
        self.now += self.cost(len(x))
        return self.model(x, t)

    def clock(self):
        return self.now


@pytest.fixture
def machine(mixture, ddim):
    """(machine, sampler) on which calls cost what the function says."""

    def make(cost, steps=50, **options):
        made = Machine(mixture(), cost)
        sampler = dq.DEQSampler(made, ddim(steps), **options)
        sampler.planner.clock = made.clock
        return made, sampler

    return make


def solve(machine, sampler, start, **more):
    """A solution whose evaluations were counted honestly."""
    machine.sizes.clear()
    out = sampler.sample(start, **more)
    assert out.stats.model_evals == sum(machine.sizes)
    assert out.stats.model_calls == len(machine.sizes)
    return out


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


def test_rounds_on_nodes_may_need_less_than_the_chain(machine, noise, relative_error):
    """On a device that rows keep busy a long chain is still faster by rounds: most timesteps are never asked."""
    device, sampler = machine(float, steps=1000, tol=5e-2)
    assert (
        decide(inputs({1: 1.0, 128: 128.0}, 1000, expect=Expectation(1000, nodes=True), nodes=True)).chosen.window
        == 1000
    )
    plan = sampler.warmup((3, 8, 8))
    assert plan.chosen.window == 1000
    assert plan.chosen.effort.evaluations < 0.5
    began = device.now
    out = solve(device, sampler, noise(1))
    assert device.now - began < 0.5 * 1000
    assert device.now - began == pytest.approx(plan.chosen.seconds, rel=0.25)
    assert relative_error(out.sample, sampler.serial(noise(1)).sample).max() < 5e-2


@pytest.mark.parametrize(
    ("steps", "plain", "drafted"), [(20, 3.1, 2.75), (50, 2.0, 1.45), (100, 1.25, 0.85), (1000, 0.18, 0.11)]
)
def test_expected_rounds_on_nodes(steps, plain, drafted):
    """Beside the bundled model's figures at a tolerance of 1e-2."""
    assert Expectation(steps, nodes=True)(steps).evaluations == pytest.approx(plain, rel=0.1)
    assert Expectation(steps, nodes=True, drafted=True)(steps).evaluations == pytest.approx(drafted, rel=0.15)
    for expect in (Expectation(steps, nodes=True), Expectation(steps, nodes=True, certify=True)):
        effort = expect(steps)
        rows = rows_of_rounds(effort, steps, steps, 3, nodes=True)
        assert sum(count for count, _ in rows) == pytest.approx(effort.rounds)
        assert sum(count * n for count, n in rows) == pytest.approx(3 * steps * effort.evaluations)
        assert all(0 < n <= 3 * steps for _, n in rows)
        expect.learn(steps, 1, RoundEstimate(7.0, effort.evaluations / 2))
        assert expect(steps) == pytest.approx((7.0, effort.evaluations / 2)), "below 1 as well"
    assert Expectation(steps, nodes=True)(steps, 1, True) == Expectation(steps)(steps, 1, True), "warm: no nodes"


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
