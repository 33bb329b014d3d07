"""A history on the host is that beside the states, whatever the pieces, and in bfloat16 nearly."""

from __future__ import annotations

import pytest
import torch

from deqdiff_fast.nodes import host_history
from deqdiff_fast.nodes.elements import Elements
from deqdiff_fast.nodes.history import NodeHistory
from deqdiff_fast.nodes.host_history import HostHistory
from deqdiff_fast.nodes.node_grid import Transfer

NODES, BATCH, SIZE, COLUMNS = 4, 3, 6, 4
given: list[dict[str, torch.Tensor]] = []


def host(tensors):
    """Memory that nobody has written to yet."""
    made = {name: torch.full(shape, float("nan"), dtype=dtype) for name, (shape, dtype) in tensors.items()}
    given.append(made)
    return made


def both(gaussian, piece=None, columns=COLUMNS):
    like = gaussian(NODES, BATCH, SIZE)
    kept = HostHistory(columns, like, 1e-9, 1e-9, Elements(piece), host)
    return NodeHistory(columns, like, 1e-9, 1e-9), kept


def remainders(gaussian):
    """Of a model, as a function of the states."""
    matrix = gaussian(NODES, BATCH, SIZE, SIZE, seed=7)
    return lambda x: torch.einsum("nbij,nbj->nbi", matrix, x) + torch.sin(3 * x)


def corrected(kept, states):
    kept.prepare()
    out = torch.empty_like(states)
    kept.correct(kept.base(), states, out)
    return out


def push_all(gaussian, histories, rounds, masked):
    ask, draw = remainders(gaussian), torch.Generator().manual_seed(4)
    for k in range(rounds):
        x = gaussian(NODES, BATCH, SIZE, seed=20 + k)
        asked = torch.rand(NODES, BATCH, generator=draw) < 0.6 if masked and k else None
        found = ask(x) if asked is None else torch.where(asked[..., None], ask(x), float("nan"))
        for kept in histories:
            kept.push(asked, x, found)


def agree(histories, gaussian, **near):
    beside, there = histories
    states = gaussian(*there.shape[:2], SIZE, seed=50)
    torch.testing.assert_close(there.base(), beside.base())
    torch.testing.assert_close(there.distance(states), beside.distance(states))
    torch.testing.assert_close(there.moved(), beside.moved(), equal_nan=True, **near)
    torch.testing.assert_close(corrected(there, states), corrected(beside, states), **near)
    for name in ("ridges", "count"):
        assert torch.equal(getattr(there, name), getattr(beside, name))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("rounds", [1, 2, 4, 7])
@pytest.mark.parametrize("piece", [None, 1, 4])
def test_in_pieces_and_without_rounding_it_is_the_same(gaussian, monkeypatch, piece, rounds, masked):
    monkeypatch.setattr(host_history, "STORED", torch.float64)
    histories = both(gaussian, piece)
    push_all(gaussian, histories, rounds, masked)
    agree(histories, gaussian, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("columns", [1, 2])
def test_few_columns(gaussian, monkeypatch, columns):
    monkeypatch.setattr(host_history, "STORED", torch.float64)
    histories = both(gaussian, 4, columns)
    push_all(gaussian, histories, 3, False)
    agree(histories, gaussian, rtol=1e-6, atol=1e-6)


def test_other_nodes(random_chain, gaussian, monkeypatch):
    monkeypatch.setattr(host_history, "STORED", torch.float64)
    old, new = (0, 5, 9, 22), (0, 3, 5, 14, 22)
    chain = random_chain(23, 1, SIZE)
    transfer = Transfer.of(chain, old, new, torch.float64, torch.device("cpu"))
    histories = both(gaussian, 4)
    push_all(gaussian, histories, 3, True)
    before, after = gaussian(NODES, BATCH, SIZE, seed=31), gaussian(len(new), BATCH, SIZE, seed=32)
    moved = [kept.moved_to(transfer, before, after) for kept in histories]
    agree(moved, gaussian, rtol=1e-5, atol=1e-5)
    assert histories[1].kept == [None, None]  # no piece is kept twice


def test_bfloat16_keeps_the_newest_answer_and_blunts_the_secants_a_little(gaussian):
    histories = both(gaussian)
    push_all(gaussian, histories, 3, False)
    given.clear()
    beside, there = histories
    x = gaussian(NODES, BATCH, SIZE, seed=22)
    near = x + 1e-3 * gaussian(NODES, BATCH, SIZE, seed=60)
    for kept in histories:  # steps of a thousandth: kept as differences, they have their three digits all the same
        kept.push(None, near, remainders(gaussian)(near))
    torch.testing.assert_close(there.base(), beside.base(), rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(there.moved(), beside.moved(), rtol=4e-3, atol=0)
    states = near + 1e-3 * gaussian(NODES, BATCH, SIZE, seed=61)
    base = beside.base()
    exact, blunt = (corrected(kept, states) - base for kept in histories)
    assert float((blunt - exact).norm() / exact.norm()) < 3e-2


def test_half_of_the_bytes(gaussian):
    given.clear()
    histories = both(gaussian, 4)
    push_all(gaussian, histories, 2, False)
    held = sum(t.nbytes for made in given for t in made.values())
    assert held == NODES * BATCH * SIZE * (2 * 8 + 2 * (COLUMNS - 1) * 2)
    assert all(made[name].dtype == torch.bfloat16 for made in given for name in ("steps", "changes"))
