"""Run by the processes of test_equality.py: what several ranks sample is what one process samples."""

from __future__ import annotations

import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_launch import run_checks
from torch import Tensor
from torch import distributed as dist

import deqdiff_fast as dq
from deqdiff_fast.ranks import ShardedModel
from deqdiff_fast.ranks.digests import digest
from deqdiff_fast.ranks.group import Ranks
from deqdiff_fast.ranks.shares import message_bytes, share_of

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from problems import Denoiser, apart, noise, schedule
from solvers import SOLVERS

ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-6}


def alike(*values: Any) -> None:
    """The same bits on all ranks."""
    numbers = Ranks.of("world").exchange([digest(*values)])
    assert all(n == numbers[0] for n in numbers), f"ranks differ: {values}"


def both(model: Any, chain: dq.Schedule, x: Tensor, kwargs: Any = None, eta: float = 0.0, **options: Any) -> Any:
    """(solution on all ranks, solution of this process alone)."""
    draw = lambda: torch.Generator().manual_seed(3) if eta else None  # noqa: E731
    ranks = Ranks.of("world")
    before = ranks.messages
    shared = dq.DEQSampler(model, chain, group="world", **options).sample(x, kwargs, draw())
    assert ranks.messages - before > shared.stats.rounds
    alone = dq.DEQSampler(model, chain, **options).sample(x, kwargs, draw())
    alike(shared.sample, shared.converged, shared.stats.rounds, shared.stats.model_evals, shared.stats.solver)
    return shared, alone


def every_solver() -> None:
    for dtype, batch, eta in ((torch.float64, 3, 1.0), (torch.float32, 1, 0.0)):
        model, chain, x = Denoiser(dtype).requires_grad_(False), schedule(16, eta), noise(batch, dtype)
        for case in SOLVERS:
            own = {"draft": model} if case.drafted else {}
            shared, alone = both(model, chain, x, eta=eta, solver=case.solver, tol=1e-5, **own)
            assert shared.stats.rounds == alone.stats.rounds, (case, dtype)
            evals = [found.stats.model_evals - found.stats.check_evals for found in (shared, alone)]
            assert evals[0] == evals[1], (case, dtype, evals)
            assert apart(shared.sample, alone.sample) <= ROUNDING[dtype], (case, dtype)


def serial_chains() -> None:
    for dtype in (torch.float64, torch.float32):
        for batch in (1, 3):
            model, chain, x = Denoiser(dtype).requires_grad_(False), schedule(24, 1.0), noise(batch, dtype)
            found = dq.DEQSampler(model, chain, group="world").serial(x, generator=torch.Generator().manual_seed(1))
            alone = dq.DEQSampler(model, chain).serial(x, generator=torch.Generator().manual_seed(1))
            alike(found.sample)
            assert apart(found.sample, alone.sample) <= ROUNDING[dtype]


def windows_and_calls_in_pieces() -> None:
    model, chain, x = Denoiser().requires_grad_(False), schedule(), noise(2)
    for options in ({"window": 7}, {"max_batch": 5}, {"certify": "full"}):
        shared, alone = both(model, chain, x, solver="quasi-newton", tol=1e-6, **options)
        assert apart(shared.sample, alone.sample) < 1e-6
        assert bool(shared.converged.all())


def planned_solves_stay_together_on_uneven_machines() -> None:
    """Rank 0 and the last rank see other times, and the plan is the same on all."""
    rank, size = dist.get_rank(), dist.get_world_size()

    class Slow(Denoiser):
        def forward(self, x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
            time.sleep(0.002 * (1 + rank * size) * (1 + len(x) // 8))
            return super().forward(x, t, **kwargs)

    model, chain = Slow().requires_grad_(False), schedule(30)
    sampler = dq.DEQSampler(model, chain, group="world")
    for number in range(4):
        solution = sampler.sample(noise(1, seed=number))
        plan = solution.stats.plan
        alike(solution.sample, solution.stats.rounds, plan.chosen.window, str(plan))
        assert apart(solution.sample, dq.DEQSampler(Denoiser(), chain).serial(noise(1, seed=number)).sample) < 1e-2
    alike(str(sampler.warmup((6,), batch=2)))
    alike(str(sampler.plan((6,), batch=2)))


def guided_models() -> None:
    base, chain, x = Denoiser().requires_grad_(False), schedule(), noise(3)
    cond, uncond = noise(3, seed=8), noise(3, seed=9)
    scale, level = torch.tensor([1.5, 2.0, 3.0], dtype=torch.float64), dq.shared(noise(1, seed=4)[0, :3])
    model = dq.guided(base, {"c": cond, "level": level}, {"c": uncond, "level": level}, scale)
    shared, alone = both(model, chain, x, solver="quasi-newton", tol=1e-6)
    assert apart(shared.sample, alone.sample) < 1e-12
    calls: list[int] = []

    class Seen(Denoiser):
        def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
            calls.append(len(x))
            return super().forward(x, t, c)

    one = dq.guided(Seen().requires_grad_(False), cond[:1], uncond[:1], 2.0)
    dq.DEQSampler(one, chain, group="world").serial(x[:1])
    rank, size = dist.get_rank(), dist.get_world_size()
    start, stop = share_of(2, size, rank)  # two halves of one row
    assert calls == [stop - start] * (30 if stop > start else 0)


def arguments_of_samples() -> None:
    """What belongs to the samples is shared out, what is marked is not, though it has as many entries."""
    model, chain, x = Denoiser().requires_grad_(False), schedule(30), noise(3)
    kwargs = {"c": noise(3, seed=2), "level": dq.shared(noise(1, width=3)[0])}
    shared, alone = both(model, chain, x, kwargs, solver="quasi-newton", tol=1e-6)
    assert apart(shared.sample, alone.sample) < 1e-12
    level = dq.shared(noise(1, width=9)[0])
    t, rows = torch.arange(9) * 100, noise(9)
    assert torch.allclose(dq.sharded(model)(rows, t, level=level), model(rows, t, level=level.value), atol=1e-13)


class InPlace(Denoiser):
    """Its first layer writes to its input."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(x.mul_(0.5), *args, **kwargs)


def gradients() -> None:
    for mode in ("implicit", "phantom", "unrolled", "reversible"):
        found = []
        for group in ("world", None):
            model, c = InPlace(), noise(2, seed=7).requires_grad_()
            x = noise(2).requires_grad_()
            sampler = dq.DEQSampler(model, schedule(8), solver="quasi-newton", tol=1e-8, gradient=mode, group=group)
            sampler.sample(x, {"c": c}).sample.square().sum().backward()
            found.append([x.grad, c.grad, *(p.grad for p in model.parameters())])
        alike(*found[0])
        for shared, alone in zip(*found):
            assert apart(shared[None], alone[None]) < 1e-9, mode


def inversions() -> None:
    model, c = Denoiser().requires_grad_(False), noise(2, seed=7)
    for eta in (0.0, 0.5):
        chain = schedule(12, eta)
        draw = lambda eta=eta: torch.Generator().manual_seed(2) if eta else None  # noqa: E731
        image = dq.DEQSampler(model, chain).serial(noise(2), {"c": c}, draw()).sample
        for method in ("equilibrium", "fixed_point", "auto", "ddim", "gradient") if eta == 0 else ("equilibrium",):
            options = {"steps": 3} if method == "gradient" else {}
            found = dq.DEQInverter(model, chain, method, group="world", **options).invert(image, {"c": c}, draw())
            alone = dq.DEQInverter(model, chain, method, **options).invert(image, {"c": c}, draw())
            alike(found.noise, found.error, found.stats.rounds)
            bound = 2e-3 if method == "auto" else 1e-9  # which takes the method that is faster
            assert apart(found.noise, alone.noise) < bound, (method, eta)


def shares_and_bytes() -> None:
    """Rows of every call, and what is sent for them, are what the formulas say."""
    ranks, rank, size = Ranks.of("world"), dist.get_rank(), dist.get_world_size()
    rows: list[int] = []

    class Seen(Denoiser):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            rows.append(len(x))
            return super().forward(x, t)

    model = dq.sharded(Seen(torch.float32))
    assert isinstance(model, ShardedModel)
    for count in (1, 2, 3, 9, 33):
        x, t = noise(count, torch.float32), torch.arange(count) * 20
        with torch.no_grad():
            model(x, t)  # the form of a row is known from here on
            rows.clear()
            sent, messages = ranks.bytes, ranks.messages
            model(x, t)
        shares = [share[0] for share in ranks.exchange([sum(rows)])]
        assert sum(shares) == count
        assert max(shares) - min(shares) <= 1
        start, stop = share_of(count, size, rank)
        assert rows == ([stop - start] if stop > start else [])
        share_bytes = math.ceil(count / size) * 6 * 4
        expected = (size - 1) * (40 + 8 * math.ceil(share_bytes / 8))
        assert expected == (size - 1) * message_bytes(count, size, 24)
        assert ranks.bytes - sent == expected + (size - 1) * 8  # and the exchange of this test
        assert ranks.messages - messages == 2


def many_solves_with_changing_shapes() -> None:
    model = Denoiser(torch.float32).requires_grad_(False)
    for number in range(int(os.environ.get("SOLVES", "24"))):
        chain, x = schedule(4 + number % 7, number % 2), noise(1 + number % 4, torch.float32, seed=number)
        draw = torch.Generator().manual_seed(number)
        solver = ("auto", "quasi-newton", "anderson")[number % 3]
        alike(dq.DEQSampler(model, chain, solver=solver, group="world").sample(x, generator=draw).sample)


def groups_of_some_ranks() -> None:
    """A group and a mesh that not all processes belong to."""
    rank, size = dist.get_rank(), dist.get_world_size()
    group = dist.new_group([0, 1])
    if rank < 2:
        found = dq.DEQSampler(Denoiser().requires_grad_(False), schedule(), group=group).serial(noise(3))
        assert apart(found.sample, dq.DEQSampler(Denoiser(), schedule()).serial(noise(3)).sample) < 1e-12
    mesh = dist.device_mesh.init_device_mesh("cpu", (1, size), mesh_dim_names=("ring", "time"))
    model = dq.sharded(Denoiser().requires_grad_(False), mesh["time"])
    assert model.deqdiff_ranks is Ranks.of(mesh["time"])
    assert model.deqdiff_ranks.size == size
    x, t = noise(5), torch.arange(5)
    with torch.no_grad():
        assert torch.allclose(model(x, t), Denoiser()(x, t), atol=1e-13)
    for wrong, error in ((mesh, ValueError), ("worlds", TypeError), (3, TypeError)):
        with pytest.raises(error, match="group: expected"):
            dq.sharded(Denoiser(), wrong)


CHECKS = (
    shares_and_bytes, every_solver, serial_chains, windows_and_calls_in_pieces,
    planned_solves_stay_together_on_uneven_machines, guided_models, arguments_of_samples, gradients, inversions,
    many_solves_with_changing_shapes, groups_of_some_ranks,
)  # fmt: skip

if __name__ == "__main__":
    torch.set_num_threads(1)
    run_checks({check.__name__: check for check in CHECKS})
