"""What a plan is made from, and a model whose calls cost what a function says, by a simulated clock."""

from __future__ import annotations

from deqdiff_fast.planner.cost_curve import Curve
from deqdiff_fast.planner.decide import PlannerInputs
from deqdiff_fast.planner.round_model import Expectation

IDLE = {1: 1.0, 128: 1.0}  # a device on which more rows are free


def inputs(points=IDLE, steps=100, batch=1, **more):
    calls = Curve(points)
    more.setdefault("expect", lambda window: Expectation(steps)(window, batch))
    return PlannerInputs(steps=steps, batch=batch, step=calls(batch), calls=calls, **more)


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


def solve(machine, sampler, start, **more):
    """A solution whose evaluations were counted honestly."""
    machine.sizes.clear()
    out = sampler.sample(start, **more)
    assert out.stats.model_evals == sum(machine.sizes)
    assert out.stats.model_calls == len(machine.sizes)
    return out
