"""What makes another recording, under a pretended API of CUDA graphs, which frees what a real one would."""

from __future__ import annotations

import functools
import logging

import pytest
import torch
from graph_solves import Net, kept, same, sampler_of, start

pytestmark = pytest.mark.usefixtures("rows_are_known")


def test_autocast_leaves_no_casts_behind(api, ddim):
    """What autocast remembers of the weights is freed at the end of its context; the dtype makes another recording."""
    net = Net(api).eval()  # only weights that require gradients are remembered
    sampler = sampler_of(net, ddim(12), tol=1e-3)
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


def test_weights_that_have_moved_are_another_recording(api, ddim, net):
    """Not written to, as far as their versions tell; where they were is something else by then."""
    sampler = sampler_of(net, ddim(12))
    assert same(sampler, api, times=6) == 0
    net.layer.weight.data = 1.5 * net.layer.weight.data
    assert same(sampler, api, times=1) > 0
    assert same(sampler, api, times=6) == 0
    assert api.freed == 0


def test_the_precision_of_products_is_another_recording(api, ddim, net):
    matmul, sampler = torch.backends.cuda.matmul, sampler_of(net, ddim(12))
    same(sampler, api)
    before = matmul.allow_tf32
    matmul.allow_tf32 = not before
    try:
        same(sampler, api)
    finally:
        matmul.allow_tf32 = before
    assert len(kept(sampler)) == 2


@pytest.mark.parametrize("change", ["trained", "moved"])
def test_a_draft_that_changes(api, ddim, net, change):
    """It is asked in Python in every solve, whatever else is replayed: no recording has its weights."""
    draft = Net(api).eval().requires_grad_(False)
    asked = []
    draft.before = lambda x: asked.append(draft.layer.weight.sum().item())
    sampler = sampler_of(net, ddim(12), solver="draft", draft=draft, certify="full", window=12)
    for _ in range(4):
        same(sampler, api, times=1)
    assert {kind for kind, _ in kept(sampler)[0].graphs.replays} >= {"model", "step"}
    if change == "trained":
        draft.layer.weight.mul_(-1)
    else:
        draft.layer.weight.data = 0.5 * draft.layer.weight.data
    del asked[:]
    same(sampler, api, times=1)
    assert {*asked} == {draft.layer.weight.sum().item()}
    assert api.freed == 0


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
        "partial": functools.partial(net),
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


def test_inference_mode_is_another_recording(api, ddim, net):
    """Tensors made under it may not be written to elsewhere."""
    sampler = sampler_of(net, ddim(12))
    with torch.inference_mode():
        same(sampler, api)
    same(sampler, api)
