"""torch.compile of the user's model: `warmup` compiles all that `sample` will need."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from torch._dynamo.utils import counters

import deqdiff_fast as dq
from deqdiff_fast.integrations.k_diffusion import sample_deq


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(12, 12)

    def forward(self, x, t, label=None):
        shift = 0 if label is None else 0.1 * label[:, None]
        return 0.8 * x + 0.1 * torch.tanh(self.layer(x) + shift + 1e-3 * t[:, None])


@pytest.fixture
def compiled():
    """A compiled model that specialises on every shape, and the list of the batch sizes it was compiled for."""
    traced: list[int] = []

    def backend(graph, inputs):
        traced.append(max(x.shape[0] for x in inputs if x.dim() == 2 and x.shape[1] == 12))
        return graph.forward

    torch._dynamo.reset()
    counters.clear()
    yield torch.compile(Net().requires_grad_(False), backend=backend, dynamic=False), traced
    torch._dynamo.reset()


OPTIONS = [
    {},
    {"solver": "quasi-newton"},
    {"solver": "triangular", "window": 9},
    {"solver": "picard", "max_batch": 16},
    {"max_batch": 16},
]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_nothing_is_compiled_after_the_warm_up(compiled, ddim, relative_error, batch, options):
    model, traced = compiled
    sampler = dq.DEQSampler(model, ddim(40), **options)
    plan = sampler.warmup((12,), batch=batch)
    assert (plan is not None) == ("solver" not in options)
    frames = counters["frames"]["total"]
    assert 0 < len(traced) == frames <= 8
    for seed in range(6):
        start = torch.randn(batch, 12, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            out, reference = sampler.sample(start), sampler.serial(start)
        assert relative_error(out.sample, reference.sample).max() < 1e-2
    assert counters["frames"]["total"] == frames
    assert len(traced) == frames
    assert counters["recompile_limit"] == {}


def test_whatever_window_the_planner_takes(compiled, ddim):
    model, traced = compiled
    sampler = dq.DEQSampler(model, ddim(40))
    sampler.warmup((12,), batch=2)
    count, planner, start = len(traced), sampler.planner, torch.randn(2, 12)
    workload = planner.workload(start, None)
    with torch.no_grad():
        for window in (2, 3, 4, 6, 8, 12, 16, 24, 32, 40):
            workload.stats.plan, workload.stats.age = planner.forced(workload, window), 0
            # else a hiccup would have it think again
            workload.stats.suspect, workload.stats.unchecked, workload.stats.measure_budget = False, 0, -math.inf
            assert sampler.sample(start).stats.window == window
    assert len(traced) == count


def test_compiled_models_inside_guidance_and_k_diffusion(compiled, ddim, karras, noise):
    model, traced = compiled
    label = torch.tensor([1.0, 2.0])
    sampler = dq.DEQSampler(dq.guided(model, {"label": label}, {"label": label[:1]}, 3.0), ddim(40))
    sampler.warmup((12,), batch=2)
    count = len(traced)
    assert count <= 8
    for seed in range(4):
        sampler.sample(torch.randn(2, 12, generator=torch.Generator().manual_seed(seed)))
    assert len(traced) == count
    torch._dynamo.reset()
    traced.clear()
    for seed in range(4):
        x = torch.randn(1, 12, generator=torch.Generator().manual_seed(seed)) * 14.0
        sample_deq(model, x, karras(24), disable=True, window=24, solver="picard")
    assert len(set(traced)) <= 8  # one more than the padded sizes: the comparison of three levels


def test_eager_solves_do_not_load_the_compiler():
    """The first sample and the first inversion would wait for it for seconds."""
    code = """
import sys, torch, deqdiff_fast as dq
abar = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
schedule = dq.Schedule.ddim(abar, torch.arange(10).flip(0) * 100)
model = lambda x, t: 0.5 * x + 0.1 * torch.tanh(x)
out = dq.DEQSampler(model, schedule, solver="quasi-newton").sample(torch.randn(1, 3, 8, 8))
found = dq.DEQInverter(model, schedule).invert(out.sample)
assert bool(found.converged.all()), found.error
print("torch._dynamo" in sys.modules)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ran.stdout.strip() == "False", ran.stdout + ran.stderr
