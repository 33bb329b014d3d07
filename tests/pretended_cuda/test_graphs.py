"""Recordings under a pretended API of CUDA graphs, which frees what a real one would and captures what one would."""

from __future__ import annotations

import copy
import logging
import threading
import warnings

import pytest
import torch
from graph_api import GraphApi
from torch import Tensor

import deqdiff_fast as dq
from deqdiff_fast.engine import graph_cache, solve
from deqdiff_fast.engine.host_waits import watch_host_waits
from deqdiff_fast.loop.task import Lookahead
from deqdiff_fast.schedule.cache import cached

FULL = dq.QuasiNewton(nodes=False)


def name(solver):
    return solver if isinstance(solver, str) else solver.name


@pytest.fixture
def api(monkeypatch):
    """The device; every solve may be recorded."""
    api = GraphApi()
    api.install(monkeypatch)
    monkeypatch.setattr(solve, "lookahead_policy", lambda system, request: Lookahead())
    recorder = graph_cache.CudaRecorder
    monkeypatch.setattr(graph_cache, "recorder_for", lambda device: recorder(torch.device("cuda", api.place)))
    return api


class Net(torch.nn.Module):
    """Notes how often Python calls it, which replays do not; `before` is called first."""

    def __init__(self, api):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(12, 12)
        self.api, self.before = api, lambda x: None

    def forward(self, x, t):
        self.api.calls += 1
        self.before(x)
        return 0.8 * x + 0.1 * torch.tanh(self.layer(x).to(x.dtype) + 1e-3 * t[:, None])


@pytest.fixture
def net(api):
    return Net(api).eval().requires_grad_(False)


class There(Tensor):
    """A tensor that is on a device, as far as it says."""

    device = property(lambda self: torch.device("cuda:0"))

    @staticmethod
    def __new__(cls, held):
        return held.as_subclass(cls)


def start(seed=0, batch=2):
    return torch.randn(batch, 12, generator=torch.Generator().manual_seed(seed))


def sampler_of(model, schedule, **options):
    return dq.DEQSampler(model, schedule, **({"solver": "picard", "tol": 1e-5, "cuda_graph": True} | options))


def same(sampler, api, times=4):
    """Solves on the device, each of which has to be the plain one; returns the calls of the model in the last."""
    for seed in (max(0, min(k, times - 3)) for k in range(times)):  # all sizes of the last were met twice before
        expected, before = sampler.serial(start(seed)).sample, api.calls
        with api:
            found = sampler.sample(start(seed)).sample
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    return api.calls - before


def kept(sampler):
    return list(sampler.options.graph_cache._cached.values())


@pytest.mark.parametrize("solver", [FULL, "picard", "triangular", "anderson"], ids=name)
def test_a_recorded_solve(api, ddim, net, solver):
    sampler = sampler_of(net, ddim(24), solver=solver)
    assert same(sampler, api, times=6) == 0, "all sizes are recorded by then"
    (entry,) = kept(sampler)
    assert {kind for kind, _ in entry.graphs.replays} == {"model", "step", "guess"}
    assert not entry.graphs.refused
    assert api.freed == 0


def test_autocast_leaves_no_casts_behind(api, ddim):
    """What autocast remembers of the weights is freed at the end of its context; the dtype makes another recording."""
    net = Net(api).eval()  # only weights that require gradients are remembered
    sampler = sampler_of(net, ddim(24), tol=1e-3)
    for dtype in (torch.bfloat16, torch.float16):
        for seed in (0, 1, 2, 2):
            with torch.autocast("cpu", dtype, cache_enabled=False):
                expected = sampler.serial(start(seed)).sample
            with torch.autocast("cpu", dtype), api:
                found = sampler.sample(start(seed)).sample
            assert api.freed == 0, "a replay has read memory that was freed"
            apart = (found - expected).norm() / expected.norm()
            assert apart < (5e-3 if dtype is torch.bfloat16 else 1e-3)
    assert len(kept(sampler)) == 2
    assert torch.is_autocast_cache_enabled()


def test_a_second_device(api, ddim, net):
    """Torch's default capture stream is the first device's, where nothing that this one is asked for is seen."""
    first = sampler_of(net, ddim(12))
    same(first, api)
    with torch.cuda.device(0):
        torch.cuda.graph(torch.cuda.CUDAGraph())  # anybody's: the default stream is made
    api.place = 1
    second = sampler_of(copy.deepcopy(net), ddim(12))
    assert same(second, api, times=5) == 0
    assert not kept(second)[0].graphs.refused


def test_threads_do_not_share_capture_streams(api, ddim, net):
    """What is captured on one stream shares the workspace of cuBLAS."""
    samplers = [sampler_of(net, ddim(8)) for _ in range(3)]
    for sampler in samplers:
        same(sampler, api)
    streams = [graph.stream for sampler in samplers for graph in {*api.graphs} if graph.pool() in pools(sampler)]
    assert len(set(streams)) == len(samplers)


def test_one_capture_at_a_time(api):
    """Torch's rule for a process; a second thread's waits until the first is over."""
    done = []

    def second():
        recorder(torch.device("cuda", 0)).record(lambda: done.append("second"))

    def first():
        thread.start()
        thread.join(0.2)
        done.append("first")

    recorder, thread = graph_cache.CudaRecorder, threading.Thread(target=second)
    recorder(torch.device("cuda", 0)).record(first)
    thread.join()
    assert done == ["first", "second"]


def pools(sampler):
    return [entry.graphs.recorder.pool for entry in kept(sampler)]


@pytest.mark.parametrize("solver", [FULL, "anderson"], ids=name)
def test_a_recording_of_nothing_is_found_out(api, ddim, net, solver, monkeypatch, caplog):
    """Of the model, whose results are there already from the plain call, of steps, and of the guess."""

    def record(recorder, work):
        with torch.utils._python_dispatch._disable_current_modes():
            return lambda: None

    monkeypatch.setattr(graph_cache.CudaRecorder, "record", record)
    sampler = sampler_of(net, ddim(24), solver=solver)
    with caplog.at_level(logging.WARNING, logger="deqdiff_fast"):
        same(sampler, api, times=3)
    for kind in ("model", "step", "guess"):
        assert f"the {kind} is not recorded (a replay does not reproduce the call" in caplog.text
    assert not kept(sampler)[0].graphs.replays


def test_a_model_that_waits_is_not_captured(api, ddim, net, caplog):
    """A failed capture may leave torch without random numbers on that device."""
    sampler = sampler_of(net, ddim(12))
    net.before = lambda x: x.sum().item()
    with caplog.at_level(logging.WARNING, logger="deqdiff_fast"):
        assert same(sampler, api, times=3) > 0
    with api:
        torch.randn(3)
    assert "the model is not recorded (it makes the host wait for the device, 1 times a call)" in caplog.text
    assert len(caplog.records) == 1
    assert {kind for kind, _ in kept(sampler)[0].graphs.replays} == {"step", "guess"}
    assert api.sync_mode == 0


def test_other_threads_may_wait_and_allocate_meanwhile(api, ddim, net):
    """While a call is watched, and while one is captured."""
    failed = []

    def elsewhere():
        try:
            if api.capturing is None:
                api.wait()
            else:
                api.allocate()
        except RuntimeError as error:
            failed.append(error)

    def before(x):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()

    net.before = before
    sampler = sampler_of(net, ddim(12))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(sampler, api) == 0
    assert not failed
    assert not kept(sampler)[0].graphs.refused


@pytest.mark.parametrize("graph", ["auto", True])
def test_weights_written_in_place_are_another_recording(api, ddim, net, graph):
    """A model may have computed something from them."""

    class Folded(Net):
        def forward(self, x, t):
            weight = self.layer.weight
            if getattr(self, "made", None) is None or self.made[0] != weight._version:
                self.made = weight._version, weight + weight.roll(1, 0)
            self.api.calls += 1
            return 0.8 * x + 0.1 * torch.tanh(x @ self.made[1] + 1e-3 * t[:, None])

    model = Folded(api).eval().requires_grad_(False)
    sampler = sampler_of(model, ddim(12), cuda_graph=graph)
    assert same(sampler, api, times=6) == 0
    with torch.no_grad():
        model.layer.weight.mul_(-1.5)
    assert same(sampler, api, times=1) > 0
    assert same(sampler, api, times=6) == 0
    assert api.freed == 0


def test_the_same_place_in_another_layout(api, ddim, net):
    memory = torch.randn(144, generator=torch.Generator().manual_seed(5)) / 4
    net.layer.weight = torch.nn.Parameter(memory.view(12, 12), requires_grad=False)
    sampler = sampler_of(net, ddim(12))
    same(sampler, api)
    net.layer.weight.data = memory.view(12, 12).T
    same(sampler, api)


@pytest.mark.parametrize("wrap", ["function", "method", "partial", "object", "guided"])
def test_weights_behind_a_function(api, ddim, net, wrap):
    """With cuda_graph=True they are looked for there."""

    class Wrapper:
        def __init__(self, net):
            self.net = net

        def __call__(self, x, t):
            return self.net(x, t)

    class Guided(Wrapper):
        base_model = property(lambda self: self.net)

    model = {
        "function": lambda x, t: net(x, t), "method": net.forward, "object": Wrapper(net), "guided": Guided(net),
        "partial": torch.nn.Module.__call__.__get__(net),
    }[wrap]  # fmt: skip
    sampler = sampler_of(model, ddim(12))
    same(sampler, api)
    with torch.no_grad():
        net.layer.weight = torch.nn.Parameter(net.layer.weight * 1.5, requires_grad=False)
    same(sampler, api)
    assert api.freed == 0


def test_a_model_that_counts_in_a_buffer_is_recorded(api, ddim, net):
    net.register_buffer("count", torch.zeros(()))
    net.before = lambda x: net.count.add_(1)
    for graph in ("auto", True):
        sampler = sampler_of(net, ddim(12), cuda_graph=graph)
        for _ in range(4):
            api.calls = 0
            with api:
                sampler.sample(start())
        assert api.calls == 0


@pytest.mark.parametrize("graph", ["auto", True])
def test_weights_without_an_address(api, ddim, net, graph, caplog):
    """Nothing could tell where they are by the next solve: they are wrapped, or stored in another way."""
    weight = net.layer.weight
    net.layer.register_parameter("index", torch.nn.Parameter(weight.detach().to_sparse(), requires_grad=False))
    sampler = sampler_of(net, ddim(8), cuda_graph=graph)
    with caplog.at_level(logging.WARNING, logger="deqdiff_fast"):
        assert same(sampler, api) > 0
    assert "it has weights without an address" in caplog.text
    assert not kept(sampler)


def test_no_room_for_a_recording(api, ddim, net, caplog):
    """The model's calls stay as large as they are; smaller ones, of which there is room, are recorded."""

    def before(x):
        if api.capturing is not None and len(x) > 12:
            raise torch.OutOfMemoryError("CUDA out of memory")

    net.before = before
    sampler = sampler_of(net, ddim(12))
    with caplog.at_level(logging.WARNING, logger="deqdiff_fast"):
        same(sampler, api, times=4)
    assert "max_batch" not in sampler.options.learned
    assert "at most" not in caplog.text
    (entry,) = kept(sampler)
    sizes = {size for kind, size in entry.graphs.replays if kind == "model"}
    assert sizes
    assert max(sizes) <= 12
    assert entry.work.system.max_batch == sampler.options.row_limit(start())
    assert not api.poisoned


def test_no_room_beside_recordings(api, ddim, net, caplog):
    """They are given up before the model's calls become smaller."""
    room = 48

    def before(x):
        if api.capturing is not None:
            api.capturing.rows = len(x)
        if api.capturing is None and len(x) + max((graph.rows for graph in api.graphs), default=0) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")

    net.before = before
    sampler = sampler_of(net, ddim(12))
    same(sampler, api, times=4)
    assert any(graph.rows == 24 for graph in api.graphs)
    with caplog.at_level(logging.WARNING, logger="deqdiff_fast"), api:
        sampler.sample(start(batch=3))  # 36 rows
    assert not any(graph.rows == 24 for graph in api.graphs)
    assert "max_batch" not in sampler.options.learned
    room = 20
    with caplog.at_level(logging.WARNING, logger="deqdiff_fast"), api:
        assert sampler.sample(start(7, batch=4)).converged.all()
    assert sampler.options.learned["max_batch"] <= 20


def test_no_room_beside_what_is_being_recorded(api, ddim, net, caplog):
    def before(x):
        if api.capturing is not None:
            api.capturing.rows = len(x)
        elif len(x) + max((graph.rows for graph in api.graphs), default=0) > 30:
            raise torch.OutOfMemoryError("CUDA out of memory")

    net.before = before
    sampler = sampler_of(net, ddim(12))
    with caplog.at_level(logging.WARNING, logger="deqdiff_fast"):
        assert same(sampler, api, times=4) > 0
    assert "the model is not recorded (there is no memory for that beside plain calls)" in caplog.text
    assert "max_batch" not in sampler.options.learned
    assert {kind for kind, _ in kept(sampler)[0].graphs.replays} == {"step", "guess"}


def test_solves_on_two_streams(api, ddim, net):
    """The second waits for the first, whose memory it takes over, and that memory knows of both."""
    sampler = sampler_of(net, ddim(12), solver=FULL)
    same(sampler, api)
    (entry,) = kept(sampler)
    slab, other = entry.work.chain.states.untyped_storage()._cdata, torch.cuda.Stream(0)
    with torch.cuda.stream(other):
        assert same(sampler, api, times=1) == 0
    same(sampler, api, times=1)
    assert not api.races, "\n".join(dict.fromkeys(api.races))
    assert (slab, other) in api.recorded


def test_what_is_seen_of_waits(api, recwarn):
    """One watch inside another; nothing where another thread is watching, or where warnings went elsewhere."""
    elsewhere = []

    def watch():
        with watch_host_waits() as waits:
            pass
        elsewhere.append(waits.known)

    with watch_host_waits() as outer:
        api.wait()
        with watch_host_waits() as inner:
            api.wait()
        thread = threading.Thread(target=watch)
        thread.start()
        thread.join()
        warnings.warn("another one", stacklevel=1)
    assert (outer.found, inner.found, outer.known, elsewhere) == (2, 1, True, [False])
    assert [str(warning.message) for warning in recwarn] == ["another one"]
    assert api.sync_mode == 0
    show = warnings.showwarning
    with watch_host_waits() as waits:
        warnings.showwarning = show
    assert not waits.known
    assert warnings.showwarning is show
    with watch_host_waits() as waits:
        pass
    assert waits.known


def test_tables_on_two_streams(api, ddim):
    """Those that a schedule keeps: a stream that did not make them waits until they are there."""
    schedule, tensor, first, other = ddim(4), There(torch.zeros(3)), torch.cuda.current_stream(), torch.cuda.Stream(0)
    first.clock[first] = 7  # so much was asked of it before
    for make in (lambda: (tensor, 1), None, None):
        assert cached(schedule, "table", make)[0] is tensor
    assert not api.recorded
    assert first not in other.clock
    with torch.cuda.stream(other):
        assert cached(schedule, "table", None)[0] is tensor
    assert other.clock[first] == 7
    assert [on for _, on in api.recorded] == [other]


def test_inference_mode_is_another_recording(api, ddim, net):
    """Tensors made under it may not be written to elsewhere."""
    sampler = sampler_of(net, ddim(12))
    with torch.inference_mode():
        same(sampler, api)
    same(sampler, api)


def test_recordings_go_with_the_sampler(api, ddim, net):
    """At once, not when the garbage collector comes: they hold the device's memory."""
    sampler = sampler_of(net, ddim(12))
    same(sampler, api)
    assert api.graphs
    import gc

    gc.collect()
    gc.disable()
    try:
        del sampler
        assert not api.graphs
    finally:
        gc.enable()


def test_the_pretended_api(api):
    """Otherwise the tests above prove nothing."""
    x, y = torch.ones(3), torch.zeros(3)
    graph = torch.cuda.CUDAGraph()
    with api:
        with torch.cuda.graph(graph):
            z = x * 2
            y.add_(z)
        assert y.tolist() == [0, 0, 0]
        x.fill_(10)
        graph.replay()
        assert y.tolist() == [20, 20, 20]
        del z
        x = torch.ones(3)
        graph.replay()
        assert api.freed == 1, "there is something else where x was"
        assert y.tolist() != [22, 22, 22]

        api.place, other = 1, torch.cuda.CUDAGraph()
        with torch.cuda.graph(other):  # on the stream of device 0
            y.fill_(5)
        assert y.tolist() == [5, 5, 5]
        y.fill_(6)
        other.replay()
        assert y.tolist() == [6, 6, 6]

        api.place = 0
        del api.races[:]
        torch.randn(3)
        with pytest.raises(RuntimeError, match="due to a previous error"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            y.sum().item()
        with pytest.raises(RuntimeError, match="Offset increment"):
            torch.randn(3)

        y = torch.zeros(3)
        assert not api.races, "\n".join(dict.fromkeys(api.races))
        with torch.cuda.stream(torch.cuda.Stream(0)):
            y.add_(1)
        assert api.races
        del api.races[:]
        y.add_(1), y.add_(1)
        assert api.races, "and back"
        del api.races[:]
        y, event = torch.zeros(3), torch.cuda.Event()
        event.record()
        with torch.cuda.stream(torch.cuda.Stream(0)):
            torch.cuda.current_stream().wait_event(event)
            y.add_(1)
        assert not api.races, "\n".join(dict.fromkeys(api.races))
