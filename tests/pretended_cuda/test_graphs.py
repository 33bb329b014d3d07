"""Captures under a pretended API of CUDA graphs, which captures what a real one would: streams, devices, threads."""

from __future__ import annotations

import copy
import logging
import threading
import warnings

import pytest
import torch
from graph_solves import FULL, kept, name, same, sampler_of

from deqdiff_fast.engine import graph_cache
from deqdiff_fast.engine.host_waits import watch_host_waits

pytestmark = pytest.mark.usefixtures("rows_are_known")


@pytest.mark.parametrize("solver", [FULL, "picard", "triangular", "anderson"], ids=name)
def test_a_recorded_solve(api, ddim, net, solver):
    sampler = sampler_of(net, ddim(24), solver=solver)
    assert same(sampler, api, times=6) == 0, "all sizes are recorded by then"
    (entry,) = kept(sampler)
    assert {kind for kind, _ in entry.graphs.replays} == {"model", "step", "guess"}
    assert not entry.graphs.refused
    assert {graph.pool() for graph in api.graphs} == {entry.graphs.recorder.pool}, "they share memory"
    assert api.freed == 0


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


def pools(sampler):
    return [entry.graphs.recorder.pool for entry in kept(sampler)]


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
