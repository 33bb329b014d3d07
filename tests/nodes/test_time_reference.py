"""What is known of a model between nodes: exactly what composite steps miss, and nodes that suit it."""

from __future__ import annotations

import pytest
import torch

from deqdiff_fast.nodes.composite import composite_steps
from deqdiff_fast.nodes.grid import equidistribute
from deqdiff_fast.nodes.time_reference import TRIED, TimeReference

STEPS, SIZE = 40, 30
CLASSES = torch.arange(SIZE) % 3
NODES = (0, 3, 7, 8, 15, 21, 30, 39)
EVEN = torch.ones(STEPS, dtype=torch.float64)


@pytest.fixture
def chain(random_chain):
    return random_chain(STEPS, 1, 3)


@pytest.fixture
def remainder(chain, gaussian):
    """(T, D), smooth in time in units of the clean sample, but for some of it that is the same wave everywhere."""
    at = torch.arange(STEPS, dtype=torch.float64)[:, None]
    waves = torch.sin(at / 8 + gaussian(1, SIZE)) + 0.1 * torch.cos(2.6 * at) * gaussian(1, SIZE, seed=2)
    return waves / chain.unit[:, None]


def reference(chain, remainder, known=None, size=1.0):
    known = torch.arange(STEPS) if known is None else known
    return TimeReference(chain, CLASSES, known, remainder[known], torch.ones(SIZE, dtype=torch.float64), size)


def sample(chain, remainder, nodes, scan, start):
    """(D,), by composite steps between nodes."""
    at = torch.tensor(nodes)
    return scan(composite_steps(chain, at, at), remainder[at][:, None], start, CLASSES)[-1, 0]


def test_what_is_missed_is_what_composite_steps_miss(chain, remainder, scan, gaussian):
    start = gaussian(1, SIZE, seed=3)
    exact = sample(chain, remainder, range(STEPS), scan, start)
    known = reference(chain, remainder, size=float(exact.norm()))
    off = sample(chain, remainder, NODES, scan, start) - exact
    assert known.missed(NODES) == pytest.approx(float(off.norm() / exact.norm()), rel=1e-6)
    assert known.missed(range(STEPS)) == pytest.approx(0, abs=1e-12)


def test_of_long_samples_the_elements_that_count_are_kept(chain, remainder, monkeypatch):
    monkeypatch.setattr("deqdiff_fast.nodes.time_reference.MOST_NUMBERS", 10 * STEPS)
    missed = remainder * (torch.arange(SIZE) < 8)  # the others are 0
    kept = TimeReference(chain, CLASSES, torch.arange(STEPS), missed, missed.norm(dim=0), 1.0)
    assert kept.remainder.shape == (STEPS, 10)
    assert kept.missed(NODES) > 0
    monkeypatch.undo()
    assert kept.missed(NODES) == pytest.approx(reference(chain, missed).missed(NODES), rel=1e-9)


def test_the_nodes_that_miss_least_of_one_sample_suit_another(chain, remainder, gaussian):
    other = remainder + torch.sin(torch.arange(STEPS) / 9)[:, None] * gaussian(1, SIZE, seed=5) / chain.unit[:, None]
    known, truth = reference(chain, remainder), reference(chain, other)
    nodes = known.best(EVEN, 14, 1e3)
    assert len(set(nodes)) == 14
    assert (nodes[0], nodes[-1]) == (0, STEPS - 1)
    tried = sorted(truth.missed(equidistribute(EVEN, 14, turn)) for turn in range(TRIED))
    assert truth.missed(nodes) <= tried[TRIED // 4]
    assert tried[0] < tried[-1] / 2
    assert known.best(EVEN, 14, 1e3) is nodes
    assert nodes != equidistribute(EVEN, 14)
    assert known.best(EVEN, 14, 1e-9) == equidistribute(EVEN, 14)


def test_nodes_that_miss_hardly_less_are_not_worth_it(chain, remainder):
    known = reference(chain, remainder)
    for count in range(6, STEPS):
        gains = [known.missed(equidistribute(EVEN, count, turn)) for turn in range(TRIED)]
        chosen = known.best(EVEN, count, 1e3) != equidistribute(EVEN, count)
        assert chosen == (min(gains) <= 0.6 * gains[0])


def test_a_sample_of_zeros_is_no_fault(chain, remainder):
    known = reference(chain, 0 * remainder, size=0.0)
    assert known.missed(NODES) == 0
    assert len(known.best(EVEN, 14, 1e-2)) == 14


def test_timesteps_that_were_not_asked_are_interpolated(chain, gaussian):
    asked = torch.tensor([k for k in range(STEPS) if k % 7 != 3])
    smooth = torch.sin(torch.arange(STEPS)[:, None] / 4 + gaussian(1, SIZE)) / chain.unit[:, None]
    found, whole = reference(chain, smooth, asked), reference(chain, smooth)
    assert 0.5 * whole.missed(NODES) < found.missed(NODES) < 1.1 * whole.missed(NODES)
