"""What rounds on nodes ask about, and what not again."""

from __future__ import annotations

import itertools

import pytest

import deqdiff_fast as dq
from deqdiff_fast.nodes.rounds import NodeRounds

pytestmark = pytest.mark.usefixtures("rows_are_known")


def test_samples_that_are_done_are_not_asked_about_at_other_nodes(mixture, ddim, noise, monkeypatch):
    """Nodes are those of the whole batch: what the slowest sample wants is not asked of all."""
    seen, ask = [], NodeRounds._ask

    def watched(self, asked, round):
        nodes, over = self.chain.grid.nodes, ~self._open()
        ask(self, asked, round)
        seen.append((nodes, over, None if asked is None else asked.any(0), self.chain.history.guess_error))

    monkeypatch.setattr(NodeRounds, "_ask", watched)
    sampler = dq.DEQSampler(mixture(components=10), ddim(100), solver="quasi-newton", window=100)
    assert all(bool(sampler.sample(noise(8, seed=seed)).converged.all()) for seed in (0, 1, 3))
    late = [entry for before, entry in itertools.pairwise(seen) if before[0] != entry[0] and bool(entry[1].any())]
    assert late, "nodes changed while some sample was done"
    assert all(asked is not None and not bool((asked & over).any()) for _, over, asked, _ in late)
    assert not any(bool(error[:, over].any()) for _, over, _, error in late), "of answers that nobody gave"


@pytest.mark.parametrize("steps", [20, 50, 1000])
def test_the_noise_is_asked_about_once(mixture, ddim, noise, steps):
    """It never changes, whatever the nodes are."""
    model, asked = mixture(), []

    def counted(x, t):
        asked.extend(t.tolist())
        return model(x, t)

    sampler = dq.DEQSampler(counted, ddim(steps), solver="quasi-newton")
    for seed in range(4):
        asked.clear()
        found = sampler.sample(noise(1, seed=seed))
        assert found.stats.rounds == found.stats.node_rounds >= 4
        assert asked.count(max(asked)) == 1
