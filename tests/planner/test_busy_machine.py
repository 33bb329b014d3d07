"""What the planner does where other processes take turns with it, on a simulated clock; and by which clock it goes."""

from __future__ import annotations

import itertools
import time

import pytest
import torch

import deqdiff_fast as dq
from deqdiff_fast.plan import RoundEstimate
from deqdiff_fast.planner.decide import promising
from deqdiff_fast.planner.measure import Costs
from deqdiff_fast.planner.monitor import work_left

CPU = torch.device("cpu")


class SharedMachine:
    """A model whose calls take `cost(n)` of a processor that goes to others for `pause` after every `turn`."""

    def __init__(self, model, cost, turn=3e-3, pause=0.0):
        self.model, self.cost, self.turn, self.pause, self.used = model, cost, turn, pause, 0.0

    def __call__(self, x, t):
        self.used += self.cost(len(x))
        return self.model(x, t)

    def clock(self):
        return self.used + int(self.used / self.turn) * self.pause


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("pause", [0.0, 3e-3, 6e-3])
@pytest.mark.parametrize(("cost", "serial"), [(lambda n: 3e-5 + 2e-5 * n, False), (lambda n: 5e-5 * n, True)])
def test_other_processes_change_no_choice(mixture, ddim, noise, pause, cost, serial, warm):
    """Steps of 0.05 ms are rarely disturbed and solves always: what is twice as fast is that under load too."""
    machine = SharedMachine(mixture(), cost, pause=pause)
    sampler = dq.DEQSampler(machine, ddim(200), tol=1e-5 if serial else 1e-2)
    sampler.planner.clock = machine.clock
    if warm:
        sampler.warmup((3, 8, 8))
    runs = [sampler.sample(noise(1, seed=k)).stats for k in range(40)]
    wrong = sum((stats.window == 1) != serial for stats in runs)
    assert wrong <= (4 if warm else 12), [stats.window for stats in runs]


def test_the_clock_of_the_thread_where_all_work_is_in_it(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert Costs().choose_clock(CPU, [1.0, 3.0, 1.0], [0.98, 0.97, 0.97]), "one step was disturbed"
    assert not Costs().choose_clock(CPU, [1.0, 1.0, 1.0], [0.1, 0.1, 0.1]), "it waits for somebody"
    assert not Costs().choose_clock(torch.device("cuda"), [1.0], [1.0])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    costs = Costs()
    assert not costs.choose_clock(CPU, [1.0], [1.0]), "other threads work as well"
    assert costs.clock is time.perf_counter


def test_what_whole_chains_say_of_a_step():
    costs = Costs()
    costs.set_call(64, 1.0), costs.set_step(1, 1.0, few=True)
    assert costs.is_of_few(1)
    costs.learn_step(1, 1.5)
    assert (costs.step(1), costs.curve()(64)) == (1.5, 1.5), "a few were faster: so are other short things"
    costs.learn_step(1, 3.0)
    assert costs.step(1) == pytest.approx(1.5 + 0.3 * 1.5)
    assert costs.curve()(64) == pytest.approx(costs.step(1)), "the machine has become slower"
    costs.set_step(1, 1.0)
    costs.learn_step(1, 1.9)
    assert costs.step(1) == 1.9, "a chain says more than a stretch"
    assert costs.curve()(64) == pytest.approx(1.95), "and nothing of the machine"
    costs.set_step(1, 1.0, few=True)
    costs.learn_step(1, 1.9, compared=True)
    assert costs.curve()(64) == pytest.approx(1.95), "solves were disturbed as well"


def test_a_window_that_has_not_moved_yet_is_no_slow_one():
    effort = RoundEstimate(13.0, 4.0)
    assert work_left(3, effort, 10, 400, 128) < 20
    assert work_left(3, effort, 130, 400, 128) >= 270 * 3 / 130
    assert work_left(8, effort, 10, 400, 128) > 100, "but one that ought to have"


def test_nothing_is_thought_about_that_cannot_be_paid(mixture, ddim, noise, monkeypatch):
    from deqdiff_fast.planner import probe

    asked = []
    monkeypatch.setattr(probe, "promising", lambda inputs, sizes: asked.append(list(sizes)) or promising(inputs, sizes))
    machine = SharedMachine(mixture(), float)
    sampler = dq.DEQSampler(machine, ddim(50))
    sampler.planner.clock = machine.clock
    for k in range(12):
        sampler.sample(noise(1, seed=k))
    assert asked
    assert all(asked)
    assert all(len(now) > len(before) for before, now in itertools.pairwise(asked)), (
        "once for each size that can be paid"
    )
