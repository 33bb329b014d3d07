"""Run by the four processes of test_mesh.py: timesteps over one dimension of a mesh, the model over the other."""

from __future__ import annotations

import json
import os
from functools import cache
from typing import Any

import torch
from problems import ALPHAS, apart, noise, schedule
from rank_launch import run_checks
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import deqdiff_fast as dq
from deqdiff_fast.ranks.group import Ranks

WIDTH, HIDDEN = 9, 16


@cache
def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("time", "x"))


class SplitMlp(nn.Module):
    """Epsilon by an MLP whose hidden units are shared out: every rank of a group makes a part of the sum (Megatron's
    tensor parallelism, arXiv 1909.08053). Without a group, all of it."""

    def __init__(self, group: Any = None) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(2)
        first = torch.randn(HIDDEN, WIDTH, generator=draw, dtype=torch.float64) / WIDTH**0.5
        second = torch.randn(WIDTH, HIDDEN, generator=draw, dtype=torch.float64) / HIDDEN**0.5
        rank, size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        part = slice(rank * HIDDEN // size, (rank + 1) * HIDDEN // size)
        self.group, self.first, self.second = group, nn.Parameter(first[part]), nn.Parameter(second[:, part])
        self.rows = list[int]()
        self.requires_grad_(False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.rows.append(len(x))
        sigma = (1 - ALPHAS[t.long()]).sqrt()[:, None]
        found = torch.tanh(x @ self.first.T) @ self.second.T
        if self.group is not None:
            dist.all_reduce(found, group=self.group)
        return sigma * x + 0.1 * sigma * found


def whole(solver: str, chain: dq.Schedule, x: Tensor, **options: Any) -> dq.Solution:
    return dq.DEQSampler(SplitMlp(), chain, solver=solver, **options).sample(x)


def timesteps_over_one_and_the_model_over_the_other() -> None:
    chain, x = schedule(), noise(3, width=WIDTH)
    for solver, options in (("quasi-newton", {"tol": 1e-3}), ("picard", {"tol": 1e-6}), ("anderson", {"tol": 1e-6})):
        model = SplitMlp(mesh()["x"].get_group())
        found = dq.DEQSampler(model, chain, solver=solver, group=mesh()["time"], **options).sample(x)
        alone = whole(solver, chain, x, **options)
        assert apart(found.sample, alone.sample) < 1e-12, solver
        assert found.stats.rounds == alone.stats.rounds
        # the rows are shared out over "time" alone: both ranks of "x" have the same, in the same order
        every = Ranks.of("world").exchange_text(json.dumps(model.rows[-20:]))
        assert every[0] == every[1]
        assert every[2] == every[3]


def planned_solves_and_serial_chains() -> None:
    model, chain = SplitMlp(mesh()["x"].get_group()), schedule(40)
    sampler = dq.DEQSampler(model, chain, group=mesh()["time"])
    for number in range(3):
        x = noise(1, width=WIDTH, seed=number)
        found, serial = sampler.sample(x), sampler.serial(x)
        exact = dq.DEQSampler(SplitMlp(), chain).serial(x).sample
        assert apart(serial.sample, exact) < 1e-12
        assert apart(found.sample, exact) < 1e-2
        plans = Ranks.of("world").exchange_text(str(found.stats.plan.chosen.window))
        assert len(set(plans)) == 1, plans


def states_shared_out_over_time() -> None:
    model, chain, x = SplitMlp(mesh()["x"].get_group()), schedule(), noise(2, width=WIDTH)
    options = {"solver": "quasi-newton", "tol": 1e-3}
    found = dq.DEQSampler(model, chain, group=mesh()["time"], shard_states=True, **options).sample(x)
    assert found.stats.rounds == found.stats.node_rounds
    assert apart(found.sample, whole(chain=chain, x=x, **options).sample) < 1e-12


CHECKS = (
    timesteps_over_one_and_the_model_over_the_other, planned_solves_and_serial_chains, states_shared_out_over_time,
)  # fmt: skip

if __name__ == "__main__":
    assert os.environ["WORLD_SIZE"] == "4"
    torch.set_num_threads(1)
    run_checks({check.__name__: check for check in CHECKS})
