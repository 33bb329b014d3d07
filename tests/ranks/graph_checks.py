"""Run by the processes of test_graphs.py: no exchange is in a CUDA graph, by a pretended API of such graphs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from problems import Denoiser, apart, noise, schedule
from rank_launch import run_checks

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "pretended_cuda"))
from graph_api import GraphApi

import deqdiff_fast as dq
from deqdiff_fast.engine import graph_cache, solve
from deqdiff_fast.loop.task import Lookahead
from deqdiff_fast.ranks.group import Ranks


def a_call_that_exchanges_is_never_captured() -> None:
    api, patch, recorder = GraphApi(), pytest.MonkeyPatch(), graph_cache.CudaRecorder
    api.install(patch)
    patch.setattr(solve, "lookahead_policy", lambda system, request: Lookahead())
    patch.setattr(graph_cache, "recorder_for", lambda device: recorder(torch.device("cuda", api.place)))
    model = Denoiser(torch.float32).requires_grad_(False).eval()
    options, captured = {"solver": "picard", "tol": 1e-5, "cuda_graph": "auto"}, []
    ranks, plain = Ranks.of("world"), Ranks.of("world").gather

    def gather(out: torch.Tensor, own: torch.Tensor) -> None:
        captured.append(api.capturing is not None)
        plain(out, own)

    patch.setattr(ranks, "gather", gather)
    for group in ("world", None):
        sampler = dq.DEQSampler(model, schedule(12), group=group, **options)
        for seed in range(4):
            x = noise(2, torch.float32, seed=seed)
            expected = dq.DEQSampler(model, schedule(12), cuda_graph=False).serial(x).sample
            with api:
                found = sampler.sample(x).sample
            assert apart(found, expected) < 1e-4
        if group is not None:
            assert api.captures == 0
            assert len(captured) > 40
            assert not any(captured)
    assert api.captures > 0  # the same solves without a group are recorded
    with pytest.raises(ValueError, match="cuda_graph: expected 'auto' or False with a group, got True"):
        dq.DEQSampler(model, schedule(12), group="world", **(options | {"cuda_graph": True}))
    patch.undo()


CHECKS = (a_call_that_exchanges_is_never_captured,)

if __name__ == "__main__":
    torch.set_num_threads(1)
    run_checks({check.__name__: check for check in CHECKS})
