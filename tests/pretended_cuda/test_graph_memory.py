"""Memory of recordings, under a pretended API of CUDA graphs: too little of it, other streams, and its end."""

from __future__ import annotations

import gc
import logging

import torch
from graph_solves import FULL, kept, same, sampler_of, start
from torch import Tensor

from deqdiff_fast.schedule.cache import cached
from deqdiff_fast.solver import Picard


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


class Allocating(Picard):
    """A solver whose memory is not the workspace's."""

    def start(self, tensors):
        return {"gain": torch.ones(1)}

    def step(self, chain, memory, round):
        chain.predictions.mul_(memory["gain"])
        super().step(chain, memory, round)


def test_a_solver_with_memory_of_its_own(api, ddim, net, caplog):
    """Its steps would go on with that of an earlier solve, which is gone."""
    sampler = sampler_of(net, ddim(12), solver=Allocating())
    with caplog.at_level(logging.WARNING, logger="deqdiff_fast"):
        assert same(sampler, api, times=5) == 0
    assert "the step is not recorded (the solver has memory of its own" in caplog.text
    assert len(caplog.records) == 1
    assert api.freed == 0


class There(Tensor):
    """A tensor that is on a device, as far as it says."""

    device = property(lambda self: torch.device("cuda:0"))

    @staticmethod
    def __new__(cls, held):
        return held.as_subclass(cls)


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


def test_recordings_go_with_the_sampler(api, ddim, net):
    """At once, not when the garbage collector comes: they hold the device's memory."""
    sampler = sampler_of(net, ddim(12))
    same(sampler, api)
    assert api.graphs
    gc.collect()
    gc.disable()
    try:
        del sampler
        assert not api.graphs
    finally:
        gc.enable()
