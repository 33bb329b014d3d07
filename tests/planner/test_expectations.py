"""What the plan is made from: costs of calls, expected rounds, and what is left of a solve."""

from __future__ import annotations

import pytest

from deqdiff_fast.nodes.grid import round_sizes
from deqdiff_fast.plan import RoundEstimate
from deqdiff_fast.planner.cost_curve import Curve
from deqdiff_fast.planner.decide import rows_of_rounds, windows
from deqdiff_fast.planner.monitor import give_up, work_left
from deqdiff_fast.planner.round_model import Expectation

pytestmark = pytest.mark.usefixtures("rows_are_known")


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


def test_rounds_on_nodes_say_nothing_of_those_with_a_window():
    expect = Expectation(100, nodes=round_sizes(100))
    windowed, on_nodes = expect(48), expect(100)
    expect.learn(100, 1, RoundEstimate(15.0, 5.0))
    assert expect(48) == windowed
    assert expect(100, 4).rounds > on_nodes.rounds, "they do of those with more samples"
    expect.learn(48, 1, RoundEstimate(20.0, 9.0))
    assert expect(100) == pytest.approx((15.0, 5.0))
    assert expect(24).rounds > Expectation(100)(24).rounds


@pytest.mark.parametrize(
    ("steps", "plain", "drafted"), [(20, 3.1, 2.75), (50, 2.0, 1.45), (100, 1.25, 0.85), (1000, 0.18, 0.11)]
)
def test_expected_rounds_on_nodes(steps, plain, drafted):
    """Beside the bundled model's figures at a tolerance of 1e-2."""
    nodes = round_sizes(steps)
    assert Expectation(steps, nodes=nodes)(steps).evaluations == pytest.approx(plain, rel=0.1)
    assert Expectation(steps, nodes=nodes, drafted=True)(steps).evaluations == pytest.approx(drafted, rel=0.15)
    for expect in (Expectation(steps, nodes=nodes), Expectation(steps, nodes=nodes, certify=True)):
        effort = expect(steps)
        rows = rows_of_rounds(effort, steps, steps, 3, nodes)
        assert sum(count for count, _ in rows) == pytest.approx(effort.rounds)
        assert sum(count * n for count, n in rows) == pytest.approx(3 * steps * effort.evaluations)
        assert all(0 < n <= 3 * steps for _, n in rows)
        expect.learn(steps, 1, RoundEstimate(7.0, effort.evaluations / 2))
        assert expect(steps) == pytest.approx((7.0, effort.evaluations / 2)), "below 1 as well"
    assert Expectation(steps, nodes=nodes)(steps, 1, True) == Expectation(steps)(steps, 1, True), "warm: no nodes"
