"""The plan: a pure choice between predictions."""

from __future__ import annotations

from dataclasses import replace

import pytest
from planner_cases import IDLE, inputs

from deqdiff_fast.planner.decide import PlannerInputs, decide, predict, promising, windows
from deqdiff_fast.planner.round_model import Expectation

pytestmark = pytest.mark.usefixtures("rows_are_known")


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
