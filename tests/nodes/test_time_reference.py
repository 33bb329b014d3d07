"""What is known of a model between nodes: exactly what composite steps miss, and sets of nodes that suffice."""

from __future__ import annotations

import pytest
import torch

from deqdiff_fast.nodes.composite import composite_steps
from deqdiff_fast.nodes.grid import equidistribute
from deqdiff_fast.nodes.node_grid import NodeGrid, per_element
from deqdiff_fast.nodes.time_reference import FINE, LEAST, MOST, SAFETY, TimeReference

STEPS, SIZE = 40, 30
CLASSES = torch.arange(SIZE) % 3
NODES = (0, 3, 7, 8, 15, 21, 30, 39)
EVEN = torch.ones(STEPS, dtype=torch.float64)


@pytest.fixture
def chain(random_chain):
    return random_chain(STEPS, 1, 3)


@pytest.fixture
def smooth(chain, gaussian):
    """(T, D) of remainders that are smooth in time in units of the clean sample, but for some of them."""
    at = torch.linspace(0, 1, STEPS, dtype=torch.float64)[:, None]
    waves = torch.sin(5 * at + gaussian(1, SIZE)) + 0.01 * gaussian(STEPS, SIZE, seed=2)
    return waves / chain.unit[:, None]


def reference(chain, remainder, size=1.0, known=None):
    known = torch.arange(STEPS) if known is None else known
    score = torch.ones(SIZE, dtype=torch.float64)
    return TimeReference(chain, CLASSES, known, remainder[known], score, size)


def sample(chain, remainder, nodes, scan, start):
    """(D,), by composite steps between nodes."""
    at = torch.tensor(nodes)
    return scan(composite_steps(chain, at, at), remainder[at][:, None], start, CLASSES)[-1, 0]


def test_what_is_missed_is_what_composite_steps_miss(chain, smooth, scan, gaussian):
    start = gaussian(1, SIZE, seed=3)
    exact = sample(chain, smooth, range(STEPS), scan, start)
    off = sample(chain, smooth, NODES, scan, start) - exact
    found = reference(chain, smooth, float(exact.norm())).missed(NODES)
    assert found == pytest.approx(float(off.norm() / exact.norm()), rel=1e-6)
    assert reference(chain, smooth).missed(range(STEPS)) == pytest.approx(0, abs=1e-12)


def test_of_long_samples_the_elements_that_count_are_kept(chain, smooth, monkeypatch):
    monkeypatch.setattr("deqdiff_fast.nodes.time_reference.MOST_NUMBERS", 10 * STEPS)
    missed = smooth * (torch.arange(SIZE) < 8)  # the others are 0
    score = missed.norm(dim=0)
    kept = TimeReference(chain, CLASSES, torch.arange(STEPS), missed, score, 1.0)
    assert kept.remainder.shape == (STEPS, 10)
    assert kept.missed(NODES) > 0
    monkeypatch.undo()
    assert kept.missed(NODES) == pytest.approx(reference(chain, missed).missed(NODES), rel=1e-9)


def test_the_ratio_makes_the_estimate_of_another_sample_right(chain, smooth, monkeypatch):
    monkeypatch.setattr("deqdiff_fast.nodes.time_reference.LEAST", 0.0)
    grid = NodeGrid.of(chain, list(NODES), torch.float64, torch.device("cpu"))
    other = 0.3 * smooth  # as rough in time, and not as large
    left_out = (grid.leave_one_out @ other[grid.at]) * per_element(grid.excess, CLASSES)[:, 0]
    known = reference(chain, smooth)
    told = float(left_out.norm()) * known.ratio(NODES)
    assert 0 < known.ratio(NODES) < MOST
    assert told == pytest.approx(SAFETY * reference(chain, other).missed(NODES), rel=1e-6)


def test_no_ratio_is_believed_that_says_next_to_nothing_or_far_too_much(chain, smooth):
    assert LEAST <= reference(chain, smooth).ratio(NODES) <= MOST
    rough = smooth * (0.01 + torch.arange(STEPS) % 2)[:, None]
    assert reference(chain, rough).ratio(tuple(range(0, STEPS, 2))) == MOST


def test_sets_leave_little_enough_and_the_few_are_among_the_others(chain, smooth):
    known, usual = reference(chain, smooth), 12
    tol = 2 * SAFETY / FINE * known.missed(equidistribute(EVEN, 24))
    few, fine = known.sets(EVEN, usual, STEPS, tol)
    assert set(few) < set(fine)
    assert (few[0], few[-1]) == (fine[0], fine[-1]) == (0, STEPS - 1)
    assert len(few) == len(set(few)) == 9
    assert SAFETY * known.missed(fine) <= FINE * tol
    fewer = [equidistribute(EVEN, count) for count in range(9, len(fine))]
    assert all(SAFETY * known.missed(nodes) > FINE * tol for nodes in fewer)


def test_there_are_none_where_no_number_of_nodes_will_do(chain, smooth):
    assert reference(chain, smooth).sets(EVEN, 12, 20, 1e-9) is None


def test_a_sample_of_zeros_is_no_fault(chain, smooth):
    known = reference(chain, 0 * smooth, size=0.0)
    assert known.missed(NODES) == 0
    assert known.ratio(NODES) == 1


def test_timesteps_that_were_not_asked_are_interpolated(chain, smooth):
    asked = torch.tensor([k for k in range(STEPS) if k % 7 != 3])
    found, whole = reference(chain, smooth, known=asked), reference(chain, smooth)
    assert 0.5 * whole.missed(NODES) < found.missed(NODES) < 1.1 * whole.missed(NODES)
