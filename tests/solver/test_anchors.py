"""The timesteps at which a draft is asked, and what the others take from them."""

from __future__ import annotations

import pytest
import torch

from deqdiff_fast.solver.anchors import Anchors

CASES = [(1, 1), (2, 5), (20, 1), (50, 2), (60, 7), (100, 4), (1000, 16), (30, 100)]


@pytest.mark.parametrize(("steps", "stride"), CASES)
def test_segments_cover_the_chain(steps, stride):
    anchors = Anchors(steps, stride)
    assert anchors.rows(torch.device("cpu")).tolist() == anchors.known()
    assert anchors.count == len(anchors.known()) <= steps
    pieces = anchors.segments(0, steps)
    assert [i for _, a, b in pieces for i in range(a, b)] == list(range(steps))
    assert [(n, a) for n, a, _ in pieces] == list(enumerate(anchors.known()))
    assert all(b - a <= stride for _, a, b in pieces)
    some = anchors.segments(steps // 3, steps // 2 + 1)
    assert some == [p for p in pieces if p.stop > steps // 3 and p.start < steps // 2 + 1]


@pytest.mark.parametrize(("steps", "stride"), CASES)
def test_what_is_linear_in_units_of_the_clean_sample_is_exact(steps, stride):
    anchors = Anchors(steps, stride)
    weight = torch.linspace(-1, -0.01, steps, dtype=torch.float64)
    at = anchors.rows(weight.device)
    own = torch.searchsorted(at, torch.arange(steps), right=True) - 1  # the last anchor that is not later
    before = (own - 1).clamp_min(0)
    shares = anchors.weights(weight)

    def taken(values):
        """What every row takes from the two anchors behind it: nothing comes from later ones."""
        return shares[:, 0] * values[at[before]] + shares[:, 1] * values[at[own]]

    assert torch.equal(shares[at], torch.tensor([[0.0, 1.0]], dtype=torch.float64).expand(anchors.count, 2))
    step = torch.arange(steps, dtype=torch.float64)
    values = (3 - 2 * step) / weight
    rows = step >= min(stride, steps)  # the first piece has one anchor only, and holds what that one says
    torch.testing.assert_close(taken(values)[rows], values[rows])
    held = 5 / weight
    torch.testing.assert_close(taken(held), held)


def test_a_weight_of_zero_divides_nothing():
    shares = Anchors(40, 4).weights(torch.zeros(40, dtype=torch.float64))
    assert shares.isfinite().all()
