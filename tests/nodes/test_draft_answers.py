"""A draft is asked again where states have moved, and nowhere else."""

from __future__ import annotations

import torch

from deqdiff_fast.nodes.draft_answers import DraftAnswers


class Counting:
    """sin(x) + timestep, and where it was asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, states, nodes):
        self.asked.append(nodes)
        return states.sin() + torch.tensor(nodes, dtype=states.dtype)[:, None, None]


def test_only_nodes_that_have_moved_are_asked():
    draft, states = Counting(), torch.randn(4, 2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    answers = DraftAnswers(draft, (0, 3, 7, 9))
    for moved, expected in (((), (0, 3, 7, 9)), ((), None), ((1, 3), (3, 9)), ((0,), (0,))):
        states = states.clone()
        for node in moved:
            states[node, 1] += 0.1  # of one sample
        before = len(draft.asked)
        said = answers.at(states, 1e-3)
        assert draft.asked[before:] == ([] if expected is None else [expected])
        torch.testing.assert_close(said, states.sin() + torch.tensor([0.0, 3, 7, 9])[:, None, None])


def test_small_moves_add_up():
    draft, states = Counting(), torch.ones(2, 1, 4, dtype=torch.float64)
    answers = DraftAnswers(draft, (1, 2))
    answers.at(states, 1e-2)
    for k in range(1, 30):
        now = states * (1 + 1e-3 * k)
        assert (answers.at(now, 1e-2) - now.sin() - torch.tensor([1.0, 2.0])[:, None, None]).abs().max() <= 1.1e-2
    assert len(draft.asked) == 1 + 2  # after moves of 1.1 and 2.2 percent


def test_an_answer_that_was_given_is_not_written_to():
    answers = DraftAnswers(Counting(), (1, 2))
    states = torch.ones(2, 1, 4)
    first = answers.at(states, 0.0)
    kept = first.clone()
    answers.at(states * 2, 0.0)
    torch.testing.assert_close(first, kept)
