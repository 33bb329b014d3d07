"""Secants at nodes: exact for linear models along the steps, kept by node and sample, carried to other nodes."""

from __future__ import annotations

import pytest
import torch

from deqdiff_fast.nodes.history import NodeHistory
from deqdiff_fast.nodes.node_grid import Transfer

NODES, BATCH, SIZE, COLUMNS = 4, 3, 6, 4


def history(gaussian, drafted=False):
    return NodeHistory(COLUMNS, gaussian(NODES, BATCH, SIZE), 1e-12, 1e-9, drafted)


class Linear:
    """A linear model of its own at every node and sample."""

    def __init__(self, gaussian):
        self.matrix, self.offset = gaussian(NODES, BATCH, SIZE, SIZE, seed=7), gaussian(NODES, BATCH, SIZE, seed=8)

    def __call__(self, x):
        return torch.einsum("nbij,nbj->nbi", self.matrix, x) + self.offset


def tell(kept, slope, states, answers, asked=None, draft=None):
    """One round; asked: (n, B) bool, where the model was asked."""
    kept.push(asked, states, answers - slope * states, None if draft is None else answers - draft)


def corrected(kept, slope, states):
    kept.prepare()
    out = torch.empty_like(states)
    kept.correct(kept.base(), states, out)
    return out + slope * states


@pytest.mark.parametrize("rounds", [2, 3, 4, 6])
def test_secants_are_the_jacobian_along_the_steps(gaussian, rounds):
    kept, model, slope = history(gaussian), Linear(gaussian), gaussian(NODES, 1, SIZE, seed=3)
    tried = [gaussian(NODES, BATCH, SIZE, seed=20 + k) for k in range(rounds)]
    for x in tried:
        tell(kept, slope, x, model(x))
    known = tried[-COLUMNS:]
    weights = torch.linspace(0.4, -0.7, len(known) - 1, dtype=torch.float64)
    inside = known[-1] + sum(w * (x - known[-1]) for w, x in zip(weights, known[:-1]))
    torch.testing.assert_close(corrected(kept, slope, inside), model(inside), rtol=1e-6, atol=1e-6)
    away = inside + gaussian(NODES, BATCH, SIZE, seed=99)
    assert (corrected(kept, slope, away) - model(away)).abs().max() > 0.1  # they know nothing of other directions


def test_one_answer_leaves_the_slope(gaussian):
    kept, slope, x = history(gaussian), gaussian(NODES, 1, SIZE, seed=3), gaussian(NODES, BATCH, SIZE)
    tell(kept, slope, x, 2 * x)
    y = gaussian(NODES, BATCH, SIZE, seed=5)
    torch.testing.assert_close(corrected(kept, slope, y), 2 * x + slope * (y - x))
    assert kept.moved().isnan().all()


def test_no_history_at_all(gaussian):
    kept, x = NodeHistory(1, gaussian(NODES, BATCH, SIZE), 1e-6, 1e-5), gaussian(NODES, BATCH, SIZE)
    slope = torch.zeros(NODES, 1, 1).double()
    for k in range(3):
        tell(kept, slope, x + k, 2 * x)
    torch.testing.assert_close(corrected(kept, slope, x), 2 * x)
    assert kept.moved().isnan().all()


def test_each_node_and_sample_counts_for_itself(gaussian):
    model, slope = Linear(gaussian), gaussian(NODES, 1, SIZE, seed=3)
    draw = torch.Generator().manual_seed(4)
    masks = [torch.ones(NODES, BATCH, dtype=torch.bool)]
    masks += [torch.rand(NODES, BATCH, generator=draw) < 0.6 for _ in range(5)]
    kept, tried = history(gaussian), [gaussian(NODES, BATCH, SIZE, seed=20 + k) for k in range(6)]
    for asked, x in zip(masks, tried):
        unasked = torch.where(asked[..., None], model(x), float("nan"))  # garbage where nobody asked
        tell(kept, slope, x, unasked, asked)
    probe = gaussian(NODES, BATCH, SIZE, seed=50)
    got = corrected(kept, slope, probe)
    for n in range(NODES):
        for b in range(BATCH):
            alone = NodeHistory(COLUMNS, probe[n : n + 1, b : b + 1], 1e-12, 1e-9)
            for asked, x in zip(masks, tried):
                if asked[n, b]:
                    own, row = slice(n, n + 1), (slice(n, n + 1), slice(b, b + 1))
                    tell(alone, slope[own], x[row], model(x)[row])
            assert alone.count.item() == kept.count[n, b]
            expected = corrected(alone, slope[n : n + 1], probe[n : n + 1, b : b + 1])[0, 0]
            torch.testing.assert_close(got[n, b], expected, rtol=1e-8, atol=1e-8)


def test_all_asked_is_as_no_mask(gaussian):
    model, kept, masked = Linear(gaussian), history(gaussian), history(gaussian)
    for k in range(5):
        x = gaussian(NODES, BATCH, SIZE, seed=20 + k)
        tell(kept, 0, x, model(x))
        tell(masked, 0, x, model(x), torch.ones(NODES, BATCH, dtype=torch.bool))
    for name in ("z", "rest"):
        assert torch.equal(torch.stack(getattr(kept, name)), torch.stack(getattr(masked, name)))
    for name in ("ridges", "count"):
        assert torch.equal(getattr(kept, name), getattr(masked, name))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_where_it_is(gaussian, bad):
    model, slope = Linear(gaussian), gaussian(NODES, 1, SIZE, seed=3)
    kept, clean = history(gaussian), history(gaussian)
    for k in range(4):
        x = gaussian(NODES, BATCH, SIZE, seed=20 + k)
        tell(clean, slope, x, model(x))
        x = x.clone()
        if k == 1:
            x[2, 1, 3] = bad
        tell(kept, slope, x, model(x))
    probe = gaussian(NODES, BATCH, SIZE, seed=50)
    got, expected = corrected(kept, slope, probe), corrected(clean, slope, probe)
    others = torch.ones(NODES, BATCH, dtype=torch.bool)
    others[2, 1] = False
    assert torch.equal(got[others], expected[others])


def test_a_step_of_no_length_is_no_secant(gaussian):
    kept, slope, x = history(gaussian), torch.zeros(NODES, 1, SIZE, dtype=torch.float64), gaussian(NODES, BATCH, SIZE)
    for _ in range(3):
        tell(kept, slope, x, 2 * x)
    torch.testing.assert_close(corrected(kept, slope, x + 1), 2 * x)
    assert not kept.moved().any()


@pytest.mark.parametrize("drafted", [False, True])
def test_other_nodes(random_chain, gaussian, drafted):
    old, new = (0, 5, 9, 22), (0, 3, 5, 14, 22)
    chain = random_chain(23, 1, SIZE)
    transfer = Transfer.of(chain, old, new, torch.float64, torch.device("cpu"))
    slope = chain.slope[list(old)][:, None]
    kept, model = history(gaussian, drafted), Linear(gaussian)
    tried = [gaussian(NODES, BATCH, SIZE, seed=20 + k) for k in range(3)]
    for x in tried:
        tell(kept, slope, x, model(x), draft=0.5 * x if drafted else None)
    states = gaussian(len(new), BATCH, SIZE, seed=40)
    now = tried[-1].clone()
    for j, t in enumerate(new):  # the states at nodes that stay are what they were
        if t in old:
            now[old.index(t)] = states[j]
    moved = kept.moved_to(transfer, now, states)
    for j, t in enumerate(new):
        if t not in old:
            assert bool((moved.ridges[:, j] == 1e-2).all())
            continue
        k = old.index(t)
        for name in ("z", "rest", *(("off",) if drafted else ())):
            for got, expected in zip(getattr(moved, name), getattr(kept, name), strict=True):
                torch.testing.assert_close(got[j], expected[k], rtol=1e-12, atol=1e-12)
        assert torch.equal(moved.ridges[:, j], kept.ridges[:, k])
    assert bool((moved.count == 3).all())
    assert (moved.off is not None) == drafted


def test_other_nodes_where_some_were_asked_less_often(random_chain, gaussian):
    """What they lack is what they have for the oldest answer: they have not moved since, and others lose nothing."""
    old, new = (0, 5, 9, 22), (0, 5, 22)
    chain = random_chain(23, 1, SIZE)
    transfer = Transfer.of(chain, old, new, torch.float64, torch.device("cpu"))
    slope, kept, model = chain.slope[list(old)][:, None], history(gaussian), Linear(gaussian)
    asked = torch.ones(NODES, BATCH, dtype=torch.bool)
    asked[0] = False
    for k in range(3):
        x = gaussian(NODES, BATCH, SIZE, seed=20 + k)
        tell(kept, slope, x, model(x), asked if k else None)
    states = gaussian(NODES, BATCH, SIZE, seed=40)
    moved = kept.moved_to(transfer, states, states[[0, 1, 3]])
    assert bool((moved.count == 3).all())
    for got, expected in zip(moved.z, kept.z, strict=True):
        torch.testing.assert_close(got[1:], expected[[1, 3]], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(got[0], kept.z[0][0], rtol=1e-12, atol=1e-12)


def test_other_nodes_by_interpolation(random_chain, gaussian):
    """A model whose remainder is a cubic in the abscissa, in the unit, is known at the new nodes too."""
    old, new, chain = (0, 5, 9, 22), (0, 2, 7, 13, 21, 22), random_chain(23, 1, SIZE)
    transfer = Transfer.of(chain, old, new, torch.float64, torch.device("cpu"))
    shape = gaussian(4, BATCH, SIZE, seed=6)

    def model(x, at):
        t, unit = chain.abscissa[list(at)] / 23, chain.unit[list(at), None, None]
        rest = torch.einsum("nk,kbd->nbd", t[:, None] ** torch.arange(4), shape) / unit
        return chain.slope[list(at)][:, None] * x + rest

    kept, start = history(gaussian), gaussian(NODES, BATCH, SIZE)
    before, after = (chain.slope[list(nodes)][:, None] for nodes in (old, new))
    for k in range(2):
        tell(kept, before, start + k, model(start + k, old))
    states = gaussian(len(new), BATCH, SIZE, seed=40)
    moved = kept.moved_to(transfer, start, states)
    for h in range(2):
        expected = model(moved.z[h], new) - after * moved.z[h]
        torch.testing.assert_close(moved.rest[h], expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(moved.z[1], states)
    torch.testing.assert_close(moved.z[0], states + 1)
