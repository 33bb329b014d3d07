"""What batch sizes a model is called with: padded for a compiled model, halved for one that runs out of memory."""

from __future__ import annotations

import logging

import pytest
import torch

import deqdiff_fast as dq
from deqdiff_fast.engine import solve
from deqdiff_fast.loop.task import Lookahead
from deqdiff_fast.model.padding import is_compiled, out_of_memory, padded_sizes

pytestmark = pytest.mark.usefixtures("rows_are_known")


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(12, 12)

    def forward(self, x, t, label=None):
        shift = 0 if label is None else 0.1 * label[:, None]
        return (0.8 * x + 0.1 * torch.tanh(self.layer(x) + shift + 1e-3 * t[:, None])).to(x.dtype)


def test_few_sizes():
    assert padded_sizes(100, 1) == (1, 13, 25, 38, 50, 75, 100)
    assert padded_sizes(100, 4) == (4, 13, 25, 38, 50, 75, 100)
    assert padded_sizes(3, 8) == (1, 2, 3)
    for limit in (1, 2, 7, 64, 1000):
        sizes = padded_sizes(limit, 1)
        assert sizes[-1] == limit
        worst = max(next(s for s in sizes if s >= n) - n for n in range(1, limit + 1))
        assert worst < limit / 4 + 1


@pytest.mark.parametrize("policy", [None, Lookahead()], ids=["host", "lookahead"])
@pytest.mark.parametrize(("window", "max_batch"), [("auto", None), (11, None), ("auto", 16)])
def test_a_compiled_model_sees_the_padded_sizes_only(monkeypatch, ddim, relative_error, policy, window, max_batch):
    monkeypatch.setattr(solve, "lookahead_policy", lambda system, request: policy)
    traced, called = [], []

    def backend(graph, inputs):
        traced.append(tuple(i.shape[0] for i in inputs if i.dim() == 2 and i.shape[1] == 12 and i.shape[0] != 12))

        def run(*args):
            called.append(max(a.shape[0] for a in args if isinstance(a, torch.Tensor) and a.dim() == 2))
            return graph.forward(*args)

        return run

    torch._dynamo.reset()
    plain, start = Small().requires_grad_(False), torch.randn(2, 12)
    compiled = torch.compile(plain, backend=backend, dynamic=False)
    kwargs = {"label": torch.tensor([0.0, 3.0])}
    options = {"window": window, "max_batch": max_batch, "solver": "picard", "tol": 1e-5}
    sampler = dq.DEQSampler(compiled, ddim(20), **options)
    out = sampler.sample(start, kwargs)
    reference = dq.DEQSampler(plain, ddim(20), **options).sample(start, kwargs)
    limit = max_batch or (40 if window == "auto" else 22)
    assert {n for n in called if n != 12} <= set(padded_sizes(limit, 2))
    assert len(called) >= reference.stats.model_calls > len(set(called))
    assert len(traced) <= len(padded_sizes(limit, 2))
    assert out.converged.all()
    assert relative_error(out.sample, reference.sample).max() < 1e-5
    assert out.stats.model_evals == reference.stats.model_evals
    before = len(traced)
    sampler.sample(torch.randn(2, 12), kwargs)
    assert len(traced) <= len(padded_sizes(limit, 2))
    sampler.sample(start, kwargs)
    assert len(traced) <= before + 2, "a size seen before must not be compiled again"


def test_what_counts_as_compiled():
    plain = Small()
    assert not is_compiled(plain)
    assert not is_compiled(lambda x, t: x)
    assert is_compiled(torch.compile(plain, backend="eager"))
    assert is_compiled(torch.compile(lambda x, t: x, backend="eager"))
    inside = torch.nn.Sequential(torch.nn.Linear(2, 2), Small())
    inside[1].compile(backend="eager")
    assert is_compiled(inside)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), RuntimeError("CUDA error: out of memory")])
@pytest.mark.parametrize("room", [1, 5, 17])
def test_out_of_memory_halves_the_batch(mixture, ddim, noise, relative_error, caplog, error, room):
    model, sizes = mixture(), []

    def tight(x, t):
        sizes.append(len(x))
        if len(x) > room:
            raise error
        return model(x, t)

    start, sampler = noise(2), dq.DEQSampler(tight, ddim(20), solver="quasi-newton", tol=1e-4)
    with caplog.at_level(logging.WARNING, logger="deqdiff_fast"):
        out = sampler.sample(start)
    failed = [n for n in sizes if n > room]
    assert failed == sorted(failed, reverse=True)
    assert len(failed) == len(caplog.records) == len(set(failed)) > 0
    assert (
        relative_error(
            out.sample, dq.DEQSampler(model, ddim(20), solver="quasi-newton", tol=1e-4).sample(start).sample
        ).max()
        < 1e-4
    )
    assert out.stats.model_evals == sum(n for n in sizes if n <= room)
    sizes.clear()
    sampler.sample(start)
    assert max(sizes) <= room, "what was learned must be remembered"


def test_one_row_too_many_is_an_error(ddim, noise):
    def hopeless(x, t):
        raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError, match="full"):
        dq.DEQSampler(hopeless, ddim(20), solver="quasi-newton").sample(noise(1))


def test_other_errors_are_not_memory():
    assert not out_of_memory(RuntimeError("shape mismatch"))
    assert not out_of_memory(KeyError("out of memory"))


@pytest.mark.parametrize("what", ["all of it", "a part of it"])
@pytest.mark.parametrize("solver", ["quasi-newton", "auto"])
def test_inputs_that_a_model_keeps_do_not_change(ddim, noise, solver, what):
    kept, copies = [], []

    def model(x, t):
        mine = x if what == "all of it" else x[:, :2]
        kept.append(mine)
        copies.append(mine.clone())
        return 0.5 * torch.tanh(x)

    sampler = dq.DEQSampler(model, ddim(8), solver=solver, max_batch=5)
    for draw in (sampler.serial, sampler.sample, sampler.sample):
        draw(noise(2, (4,)))
        draw(noise(2, (4,), seed=1))
    assert all(torch.equal(mine, copy) for mine, copy in zip(kept, copies))


@pytest.mark.parametrize("model", [lambda x, t: x, lambda x, t: torch.tanh(x), lambda x, t: x.mul_(0.1)])
def test_a_model_that_keeps_nothing_gets_the_same_memory_again(ddim, noise, model):
    places = set()

    def watched(x, t):
        places.add(x.data_ptr())
        return model(x, t)

    sampler = dq.DEQSampler(watched, ddim(8), solver="quasi-newton")
    sampler.sample(noise(2, (4,)))
    assert len(places) == 1
    assert not sampler.options.learned


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("solver", ["picard", "quasi-newton"])
def test_scaled_inputs_are_the_serial_chains_in_16_bits_too(karras, noise, dtype, solver):
    """A scale that is itself rounded to 16 bits would be off by up to 0.4 %, in rounds and not in the serial chain."""
    seen = []

    def model(x, sigma):
        seen.append((x[sigma == sigma.max()].clone(), sigma.max()))
        return 0.5 * x

    schedule = dq.Schedule.from_sigmas(karras(12), prediction_type="epsilon")
    sampler, start = dq.DEQSampler(model, schedule, solver=solver), (noise(2, (8,)) * 14).to(dtype)
    sampler.serial(start)
    (expected, first), _ = seen[0], seen.clear()
    sampler.sample(start)
    inputs = [x for x, sigma in seen if sigma == first]
    assert inputs
    for x in inputs:
        assert torch.equal(x[:2], expected)
