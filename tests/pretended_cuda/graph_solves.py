"""Solves whose device work is recorded, on the pretended API of CUDA graphs."""

from __future__ import annotations

import torch

import deqdiff_fast as dq

FULL = dq.QuasiNewton(nodes=False)


def name(solver):
    return solver if isinstance(solver, str) else solver.name


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
