"""A draft is asked again where states have moved, and nowhere else."""

from __future__ import annotations

import torch

from deqdiff_fast.nodes.draft_answers import DraftAnswers


class Counting:
    """sin(x) + timestep, and where it was asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, states, timesteps, samples):
        self.asked.append(list(zip(timesteps.tolist(), samples.tolist())))
        return states.sin() + timesteps[:, None]


def test_only_what_has_moved_is_asked_about():
    draft, states = Counting(), torch.randn(4, 2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    at = torch.tensor([0, 3, 7, 9])
    answers, every = DraftAnswers(draft, at, 2), [(k, b) for k in at.tolist() for b in (0, 1)]
    for moved, expected in (((), [every]), ((), []), ((1, 3), [[(3, 1), (9, 1)]]), ((0,), [[(0, 1)]])):
        states = states.clone()
        for node in moved:
            states[node, 1] += 0.1
        before = len(draft.asked)
        said, there = answers.at(states, 1e-3)
        torch.testing.assert_close(there, states)
        assert draft.asked[before:] == expected
        torch.testing.assert_close(said, states.sin() + at[:, None, None])


def test_only_samples_that_want_to_know_are_asked_about():
    draft, states = Counting(), torch.ones(2, 3, 4)
    answers = DraftAnswers(draft, torch.tensor([1, 2]), 3)
    old, _ = answers.at(states, 1e-3)
    said, there = answers.at(2 * states, 1e-3, torch.tensor([False, True, False]))
    assert there[0, :, 0].tolist() == [1, 2, 1]
    assert draft.asked[1:] == [[(1, 1), (2, 1)]]
    torch.testing.assert_close(said[:, 0], old[:, 0])
    torch.testing.assert_close(said[:, 1], (2 * states).sin()[:, 1] + torch.tensor([1.0, 2.0])[:, None])


def test_small_moves_add_up():
    draft, states = Counting(), torch.ones(2, 1, 4, dtype=torch.float64)
    answers = DraftAnswers(draft, torch.tensor([1, 2]), 1)
    answers.at(states, 1e-2)
    for k in range(1, 30):
        now = states * (1 + 1e-3 * k)
        assert (answers.at(now, 1e-2)[0] - now.sin() - torch.tensor([1.0, 2.0])[:, None, None]).abs().max() <= 1.1e-2
    assert len(draft.asked) == 1 + 2  # after moves of 1.1 and 2.2 percent


def test_an_answer_that_was_given_is_not_written_to():
    answers = DraftAnswers(Counting(), torch.tensor([1, 2]), 1)
    states = torch.ones(2, 1, 4)
    first, _ = answers.at(states, 0.0)
    kept = first.clone()
    answers.at(states * 2, 0.0)
    torch.testing.assert_close(first, kept)
