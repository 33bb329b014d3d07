"""Rounds recorded and replayed. A tape stands in for the CUDA graph: it repeats the same operations on the same
tensors, whatever the host thinks of them by then, and refuses what a graph refuses."""

from __future__ import annotations

import logging

import pytest
import torch
from graph_tape import TapeRecorder

import deqdiff_fast as dq
from deqdiff_fast.engine import graph_cache as resident
from deqdiff_fast.engine import solve
from deqdiff_fast.loop.task import Lookahead
from deqdiff_fast.model.padding import padded_sizes

pytestmark = pytest.mark.usefixtures("rows_are_known")


class Net(torch.nn.Module):
    """Counts how often Python calls it: replays do not."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(12, 12)
        self.python_calls, self.sizes, self.state = 0, set(), 0.0

    def forward(self, x, t, label=None):
        self.python_calls += 1
        self.sizes.add(len(x))
        shift = 0 if label is None else 0.1 * label[:, None]
        return 0.8 * x + 0.1 * torch.tanh(self.layer(x) + shift + 1e-3 * t[:, None]) + self.state


@pytest.fixture
def recorded(monkeypatch):
    """Records on the CPU; every solve is late."""
    recorder = TapeRecorder()
    monkeypatch.setattr(solve, "lookahead_policy", lambda system, request: Lookahead())
    monkeypatch.setattr(resident, "recorder_for", lambda device: recorder)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return recorder


@pytest.fixture
def net():
    return Net().eval().requires_grad_(False)


FULL = dq.QuasiNewton(nodes=False)


def name(solver):
    return solver if isinstance(solver, str) else solver.name


@pytest.mark.parametrize("solver", [FULL, "picard", "triangular", "anderson"], ids=name)
@pytest.mark.parametrize("window", ["auto", 9])
def test_replayed_rounds_are_the_rounds(recorded, ddim, net, relative_error, solver, window):
    options = {"solver": solver, "window": window, "tol": 1e-5}
    sampler = dq.DEQSampler(net, ddim(24, eta=0.4), cuda_graph=True, **options)
    plain = dq.DEQSampler(net, ddim(24, eta=0.4), cuda_graph=False, **options)
    for seed in (0, 1, 2, 2, 2):  # the last meets no size that the one before did not
        start = torch.randn(2, 12, generator=torch.Generator().manual_seed(seed))
        kwargs = {"label": torch.randn(2, generator=torch.Generator().manual_seed(100 + seed))}
        expected = plain.sample(start, kwargs, generator=torch.Generator().manual_seed(seed))
        net.python_calls, net.sizes = 0, set()
        out = sampler.sample(start, kwargs, generator=torch.Generator().manual_seed(seed))
        assert out.stats.rounds == expected.stats.rounds
        assert relative_error(out.sample, expected.sample).max() < 1e-6
        assert out.stats.model_calls == expected.stats.model_calls
        assert out.stats.model_evals == expected.stats.model_evals
        assert net.sizes <= set(padded_sizes(48 if window == "auto" else 18, 2))
    assert net.python_calls == 0, "by now all sizes are recorded"
    assert recorded.tapes >= 2


def test_rounds_on_nodes_are_not_recorded(recorded, ddim, net):
    """The full rounds that follow them are."""
    start = torch.randn(2, 12, generator=torch.Generator().manual_seed(0))
    for certify, full in (("estimate", False), ("full", True)):
        options = {"solver": "quasi-newton", "tol": 1e-5, "certify": certify}
        sampler = dq.DEQSampler(net, ddim(24), cuda_graph=True, **options)
        expected = dq.DEQSampler(net, ddim(24), cuda_graph=False, **options).sample(start)
        before = recorded.tapes
        for _ in range(4):
            net.python_calls = 0
            out = sampler.sample(start)
            assert out.stats.rounds == expected.stats.rounds
            assert out.stats.node_rounds == expected.stats.node_rounds > 0
            assert out.stats.model_calls == expected.stats.model_calls
            unchecked = [stats.model_evals - stats.check_evals for stats in (out.stats, expected.stats)]
            assert unchecked[0] == unchecked[1]
            torch.testing.assert_close(out.sample, expected.sample)
        assert net.python_calls == out.stats.node_rounds
        assert (out.stats.rounds > out.stats.node_rounds) == (recorded.tapes > before) == full


@pytest.mark.parametrize("window", ["auto", 20])
def test_replayed_rounds_with_a_draft(recorded, ddim, net, relative_error, window):
    """Rounds on nodes, where the draft is called, are not recorded, and counted as they are; those that follow are."""
    draft = Net().eval().requires_grad_(False)
    options = {"solver": "draft", "draft": draft, "window": window, "tol": 1e-5, "certify": "full"}
    sampler = dq.DEQSampler(net, ddim(60), cuda_graph=True, **options)
    plain = dq.DEQSampler(net, ddim(60), cuda_graph=False, **options)
    with torch.no_grad():
        draft.layer.weight.mul_(1.05)
    for seed in (0, 1, 2, 2, 2):
        start = torch.randn(2, 12, generator=torch.Generator().manual_seed(seed))
        expected = plain.sample(start)
        net.python_calls = draft.python_calls = 0
        out = sampler.sample(start)
        assert out.stats.rounds == expected.stats.rounds
        assert out.stats.node_rounds == expected.stats.node_rounds
        assert (out.stats.node_rounds > 0) == (out.stats.draft_evals > 0) == (window == "auto")
        assert relative_error(out.sample, expected.sample).max() < 1e-6
        assert out.stats.model_evals == expected.stats.model_evals
        assert out.stats.draft_evals == expected.stats.draft_evals
        assert out.stats.rounds > out.stats.node_rounds
    assert net.python_calls == out.stats.node_rounds
    (kept,) = sampler.options.graph_cache._cached.values()
    assert not kept.graphs.refused
    kinds = {kind for kind, _ in kept.graphs.replays}
    assert kinds == {"model", "step"} | ({"guess"} if window == 20 else set())


def test_a_model_with_a_state_of_its_own_is_refused(recorded, ddim, net, caplog, relative_error):
    """Python that a recording does not see: the tape would repeat the first value."""
    sampler = dq.DEQSampler(net, ddim(24), cuda_graph=True, solver="picard")
    hook = net.register_forward_pre_hook(lambda *_: setattr(net, "state", net.state + 0.01))
    with caplog.at_level(logging.WARNING, logger="deqdiff_fast"):
        sampler.sample(torch.randn(2, 12))
    assert "does not reproduce the call" in caplog.text
    hook.remove()


def test_a_model_that_looks_at_its_input_is_called_plainly(recorded, ddim, net, caplog, relative_error):
    def model(x, t):
        return net(x, t) if float(t.max()) >= 0 else x

    sampler = dq.DEQSampler(model, ddim(24), cuda_graph=True, solver="picard", tol=1e-5)
    start = torch.randn(2, 12)
    with caplog.at_level(logging.WARNING, logger="deqdiff_fast"):
        for _ in range(2):
            out = sampler.sample(start)
    assert "the model is not recorded (RuntimeError: operation not permitted" in caplog.text
    assert len(caplog.records) == 1
    assert relative_error(out.sample, dq.DEQSampler(net, ddim(24)).serial(start).sample).max() < 1e-5
    assert recorded.tapes >= 1, "the solver's step is recorded all the same"


def test_auto_records_from_the_second_solve_on(recorded, ddim, net):
    sampler = dq.DEQSampler(net, ddim(24), solver="picard")
    start = torch.randn(2, 12)
    sampler.sample(start)
    assert recorded.tapes == 0
    for _ in range(4):
        sampler.sample(start)
    assert recorded.tapes > 0
    net.python_calls = 0
    sampler.sample(start)
    assert net.python_calls == 0


def test_auto_leaves_functions_and_training_alone(recorded, ddim, net):
    for model in (lambda x, t: net(x, t), Net().train().requires_grad_(False)):
        sampler = dq.DEQSampler(model, ddim(12), solver="picard")
        for _ in range(3):
            sampler.sample(torch.randn(2, 12))
    assert recorded.tapes == 0


def test_other_weights_are_another_recording(recorded, ddim, net, relative_error):
    sampler = dq.DEQSampler(net, ddim(12), solver="picard", cuda_graph=True, tol=1e-6)
    start = torch.randn(2, 12)
    for _ in range(3):
        sampler.sample(start)
    net.layer = torch.nn.Linear(12, 12).requires_grad_(False)
    plain = dq.DEQSampler(net, ddim(12), tol=1e-6, cuda_graph=False).serial(start)
    assert relative_error(sampler.sample(start).sample, plain.sample).max() < 1e-5


def test_two_solves_at_once(recorded, ddim, net, relative_error):
    """The second finds the recorded memory in use and takes its own."""
    sampler = dq.DEQSampler(net, ddim(12), solver="picard", cuda_graph=True, tol=1e-6)
    start = [torch.randn(2, 12) for _ in range(2)]
    for _ in range(3):
        sampler.sample(start[0])
    inner = []

    class Nested(torch.nn.Module):
        def forward(self, x, t):
            if not inner:
                inner.append(None)
                inner[0] = sampler.sample(start[1])
            return net(x, t)

    outer = dq.DEQSampler(Nested(), ddim(12), solver="picard", tol=1e-6).sample(start[0])
    for out, noise in zip((outer, inner[0]), start):
        assert relative_error(out.sample, dq.DEQSampler(net, ddim(12)).serial(noise).sample).max() < 1e-5


def test_an_interrupted_solve_leaves_nothing(recorded, ddim, net):
    memory = dq.SolverMemory()
    sampler = dq.DEQSampler(net, ddim(12), solver="picard", cuda_graph=True, memory=memory)
    hook = net.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        sampler.sample(torch.randn(2, 12))
    hook.remove()
    assert sampler.sample(torch.randn(2, 12)).converged.all()
    assert memory.stats()["reuses"] >= 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device to record on")
def test_without_a_device(ddim, net):
    with pytest.raises(ValueError, match=r"cuda_graph: .* no such device"):
        dq.DEQSampler(net, ddim(12), solver="quasi-newton", cuda_graph=True)
    sampler = dq.DEQSampler(net, ddim(12), solver="quasi-newton", cuda_graph="auto")
    for _ in range(2):
        assert sampler.sample(torch.randn(2, 12)).converged.all()
    assert not sampler.options.graph_cache._cached


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("solver", [FULL, "triangular"], ids=name)
def test_on_cuda(ddim, net, relative_error, solver):
    net.cuda()
    sampler = dq.DEQSampler(net, ddim(24), solver=solver, cuda_graph=True, tol=1e-5)
    for seed in range(4):
        start = torch.randn(2, 12, generator=torch.Generator().manual_seed(seed)).cuda()
        net.python_calls = 0
        out = sampler.sample(start)
        assert relative_error(out.sample.cpu(), sampler.serial(start).sample.cpu()).max() < 1e-4
    (kept,) = sampler.options.graph_cache._cached.values()
    assert not kept.graphs.refused
    assert kept.graphs.replays
