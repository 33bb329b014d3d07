"""The solvers live in one slab: after the first round nothing of a sample's size is allocated outside the model.

Rounds on nodes are the exception: what they keep is torch's, of the nodes' size, and never of the chain's.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import deqdiff_fast as dq

FULL = dq.QuasiNewton(nodes=False)


def name(solver):
    return solver if isinstance(solver, str) else solver.name


class Allocations(TorchDispatchMode):
    """Counts results that do not live in the memory of an argument and have at least `size` elements."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.paused, self.found = size, False, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not self.paused:
            given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
            for t in tree_leaves(out):
                if (
                    isinstance(t, torch.Tensor)
                    and t.numel() >= self.size
                    and t.untyped_storage().data_ptr() not in given
                ):
                    self.found.append(f"{func} {tuple(t.shape)}")
        return out


def count(mixture, ddim, noise, steps=20, batch=3, size=768, **options):
    model, per_round = mixture((3, 16, 16)), []
    mode = Allocations(size)

    def quiet(x, t):
        mode.paused = True
        out = model(x, t)
        mode.paused = False
        return out

    def callback(info):
        per_round.append(list(mode.found))
        mode.found.clear()

    sampler = dq.DEQSampler(quiet, ddim(steps, eta=0.5), backend="cpp", tol=1e-5, **{"solver": FULL} | options)
    with mode:
        out = sampler.sample(noise(batch, (3, 16, 16)), callback=callback)
    assert out.converged.all()
    assert (out.stats.node_rounds > 0) == (options.get("solver") == "quasi-newton")
    return per_round


@pytest.mark.parametrize("solver", ["picard", "anderson", "triangular", "deq-ddim", "paradigms", FULL], ids=name)
def test_rounds_allocate_nothing(mixture, ddim, noise, solver):
    rounds = count(mixture, ddim, noise, solver=solver)
    assert len(rounds) > 3
    assert rounds[0]
    assert not any(rounds[1:])


def test_spectral_rounds_allocate_nothing(mixture, ddim, noise):
    spectrum = dq.SpectralSlope.from_model(mixture((3, 16, 16)), ddim(5), (3, 16, 16), count=4)
    rounds = count(mixture, ddim, noise, spectrum=spectrum, max_batch=16)
    assert len(rounds) > 3
    assert not any(rounds[1:])


def test_rounds_on_nodes_allocate_no_chain(mixture, ddim, noise):
    """All that one of them asks for is less than the states of all timesteps."""
    steps, batch = 500, 2
    rounds = count(mixture, ddim, noise, steps, batch, steps * batch * 768, solver="quasi-newton")
    assert len(rounds) > 3
    assert rounds[0], "the workspace and the noise"
    assert not any(rounds[1:])


def test_the_counter_counts():
    with Allocations(768) as mode:
        torch.zeros(10).add_(1)
        x = torch.zeros(800)
        y = x + 1
        y.mul_(2)
        y.view(2, 400)
    assert len(mode.found) == 2


def test_second_solve_reuses_the_slab(mixture, ddim, noise):
    memory = dq.SolverMemory()
    sampler = dq.DEQSampler(mixture(), ddim(20), solver="quasi-newton", memory=memory)
    sampler.sample(noise(2))
    before = memory.stats()
    sampler.sample(noise(2, seed=1))
    after = memory.stats()
    assert after["bytes"] == before["bytes"]
    assert after["reuses"] == before["reuses"] + 1
