"""The tape that stands in for a CUDA graph, and recordings on it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from graph_tape import TapeRecorder

from deqdiff_fast.engine.cuda_graphs import Graphs

pytestmark = pytest.mark.usefixtures("rows_are_known")


def test_a_tape_repeats_what_a_graph_would():
    """Otherwise the tests on it prove nothing."""
    x, y, k = torch.ones(3), torch.zeros(3), 2.0

    def work():
        y.add_(x * k)

    replay = TapeRecorder().record(work)
    assert y.tolist() == [0, 0, 0]
    k = 5.0
    x.fill_(10)
    replay()
    assert y.tolist() == [20, 20, 20]
    with pytest.raises(RuntimeError, match="not permitted"):
        TapeRecorder().record(lambda: x.max().item())


def test_plays_plainly_then_recorded():
    counts = SimpleNamespace(model_calls=0, model_evals=0, shrinks=True)
    out, calls = torch.zeros(2), []

    def work():
        calls.append(1)
        counts.model_calls += 1
        out.add_(1)

    graphs = Graphs(TapeRecorder(), torch.zeros(1), [out], counts)
    for _ in range(4):
        graphs.replay(("step", 0), work)
    assert out.tolist() == [4, 4]
    assert len(calls) == 3, "plainly, plainly once more to compare, and recorded"
    assert counts.model_calls == 4
