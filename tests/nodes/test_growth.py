"""How far errors are carried: as by slopes where nothing else is known, exactly where the answers tell the Jacobian."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import deqdiff_fast as dq
from deqdiff_fast.nodes import rounds
from deqdiff_fast.nodes.elements import ALL_ELEMENTS
from deqdiff_fast.nodes.growth import LARGEST, SWEEPS, growth
from deqdiff_fast.nodes.history import NodeHistory
from deqdiff_fast.nodes.node_grid import NodeGrid

BATCH, COLUMNS = 3, 4
# (T, seed, sample): on the way to another mode of the data than the serial chain's, where the model amplifies
NEAR_A_DECISION = [(50, 146, 7), (50, 154, 4), (100, 104, 5), (100, 108, 3), (100, 190, 7)]


@pytest.fixture
def told(random_chain, scan, gaussian):
    """A chain at some nodes of a model that adds `beyond`: (n,), times the state to what its slopes say; rest: (n, D),
    of elements of which rounds have moved the first only."""

    def make(nodes, steps, beyond, answers, lags=1, rest=None):
        grid = NodeGrid.of(random_chain(steps, lags, 1), nodes, torch.float64, torch.device("cpu"))
        count = len(nodes)
        rest = gaussian(count, BATCH, 1, seed=30) if rest is None else rest[:, None].expand(-1, BATCH, -1).clone()
        history = NodeHistory(COLUMNS, rest, 1e-14, 1e-12)
        for k in range(answers):
            states = torch.zeros_like(rest)
            states[..., :1] = gaussian(count, BATCH, 1, seed=10 + k)
            history.push(None, states, beyond[:, None, None] * states)
        history.prepare()
        states = scan(grid.steps, rest, gaussian(BATCH, rest.shape[2]), torch.zeros(rest.shape[2]))
        problem = SimpleNamespace(classes=None, elements=ALL_ELEMENTS, backend="reference", host=None)
        return SimpleNamespace(
            problem=problem, grid=grid, remainder=rest, surprise=rest, states=states, history=history
        )

    return make


@pytest.mark.parametrize("nodes", [[0, 3, 7, 8, 15, 21, 22], [0, 22], [0], list(range(23))], ids=len)
def test_nothing_but_slopes_is_no_growth(told, nodes):
    one_answer = told(nodes, 23, torch.ones(len(nodes)).double(), 1)
    torch.testing.assert_close(growth(one_answer), torch.ones(len(nodes), BATCH, dtype=torch.float64))
    no_more = told(nodes, 23, torch.zeros(len(nodes)).double(), 2)
    torch.testing.assert_close(growth(no_more), torch.ones(len(nodes), BATCH, dtype=torch.float64))


def test_it_is_the_jacobian_that_the_answers_tell(told, random_chain):
    steps = SWEEPS + 1
    chain = random_chain(steps, 1, 1)
    a, b, c = chain.state_coef[:, 0], chain.model_coef[:, 0], chain.slope[:, 0]
    beyond = torch.linspace(0.5, 2.0, steps, dtype=torch.float64) * (b * (a + b * c)).sign()
    gain = ((a + b * (c + beyond)) / (a + b * c)).abs()
    after = [gain[j + 1 :].prod() for j in range(steps)]  # an error that begins after node j
    expected = torch.stack(after).clamp(1, LARGEST)
    assert expected.max() > 1.5
    found = growth(told(list(range(steps)), steps, beyond, 2))
    torch.testing.assert_close(found, expected[:, None].expand(-1, BATCH), rtol=1e-5, atol=1e-5)


def test_misses_that_cancel_from_node_to_node(told, random_chain):
    """Along the first element, which the model amplifies, they have signs by which they would add up to nothing."""
    steps = SWEEPS + 1
    local = random_chain(steps, 1, 1)
    gain = (local.state_coef + local.model_coef * local.slope)[:, 0]
    beyond = torch.where(local.model_coef[:, 0] > 0, gain, -gain) * 2 / local.model_coef[:, 0].abs()  # thrice the gain
    alternating = torch.zeros(steps, dtype=torch.float64)
    alternating[0], alternating[1] = 1, -3 * gain[1] * local.model_coef[0, 0] / local.model_coef[1, 0]
    rest = torch.stack([alternating, torch.full_like(alternating, 0.1)], 1)
    several = growth(told(list(range(steps)), steps, beyond, 2, rest=rest))
    own = told(list(range(steps)), steps, beyond, 2, rest=rest)
    own.grid = replace(own.grid, signs=own.grid.signs[:, :1])
    natural = growth(own)
    assert bool((several[1] > 2 * natural[1]).all())


def test_the_signs_one_after_the_other(told):
    """As where memory is short."""
    chain = told(list(range(9)), 9, torch.linspace(-1, 1, 9).double(), 2, rest=torch.randn(9, 4).double())
    together = growth(chain)
    chain.problem.host = object()
    torch.testing.assert_close(growth(chain), together)


def test_it_is_bounded_and_never_below_one(told):
    nodes = [0, 3, 7, 8, 15, 21, 22]
    for factor in (-0.5, 1e3, 1e200, float("nan")):
        found = growth(told(nodes, 23, torch.full((7,), factor, dtype=torch.float64), 2))
        assert bool((found >= 1).all())
        assert bool((found <= LARGEST).all())


def test_fewer_samples_are_false_where_the_model_amplifies(mixture, ddim, noise, relative_error, monkeypatch):
    def false(tol=5e-2):
        wrong = []
        for steps, seed, k in NEAR_A_DECISION:
            sampler = dq.DEQSampler(mixture(), ddim(steps), solver="quasi-newton", tol=tol, window=steps)
            start = noise(8, seed=seed)[k : k + 1]
            found = sampler.sample(start)
            error = relative_error(found.sample, sampler.serial(start).sample)
            wrong.append(bool(found.converged.all()) and float(error) > tol)
        return sum(wrong)

    told = false()
    monkeypatch.setattr(rounds, "growth", lambda chain: torch.ones(len(chain.remainder), chain.states.shape[1]))
    assert told < false()


def test_what_was_amplified_on_some_nodes_counts_on_others(mixture, ddim, noise, monkeypatch):
    """There secants are interpolated, and tell less."""
    factors, seen = iter([1.0, 6.0]), []
    original = rounds.NodeRounds._estimate_error

    def noted(self, found, *rest):
        seen.append(float((found.grown / found.interpolation).max()))
        return original(self, found, *rest)

    like = torch.ones_like
    monkeypatch.setattr(
        rounds, "growth", lambda chain: next(factors, 1.0) * like(chain.history.distance(chain.states[:-1]))
    )
    monkeypatch.setattr(rounds.NodeRounds, "_estimate_error", noted)
    dq.DEQSampler(mixture(), ddim(1000), solver="quasi-newton").sample(noise(1))
    assert seen[:3] == [pytest.approx(1.0)] * 3
    first = next(k for k, ratio in enumerate(seen) if ratio > 2)
    assert first < len(seen) - 1
    assert seen[first:] == [pytest.approx(6.0)] * len(seen[first:])
