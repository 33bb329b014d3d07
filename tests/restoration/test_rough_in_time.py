"""DDRM's noise is another one at every timestep: what a model says in between is no interpolation of its neighbours."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import deqdiff_fast as dq
from deqdiff_fast.operators import Downsample

SHAPE = (3, 8, 8)
TOL = 1e-2


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def largest_error(model: Any, schedule: dq.Schedule, relative_error: Any, sigma: float) -> tuple[float, int]:
    """Of 16 samples that all say that they have converged, and how many rounds were made on nodes."""
    worst, on_nodes = 0.0, 0
    for seed in range(4):
        which = torch.randint(10, (4,), generator=generator(50 + seed))
        x = model.means[which].view(4, *SHAPE).float() + 0.22 * torch.randn(4, *SHAPE, generator=generator(7 + seed))
        y = Downsample(4).A(x)
        y = y + sigma * torch.randn(y.shape, generator=generator(800 + seed))
        restorer = dq.DEQRestorer(
            model, schedule, Downsample(4), sigma=sigma, method="ddrm", solver="quasi-newton", window=20
        )
        expected, found = (
            solve(y, generator=[generator(10**6 + 100 * seed + k) for k in range(4)])
            for solve in (restorer.serial, restorer.restore)
        )
        assert bool(found.converged.all())
        worst = max(worst, float(relative_error(found.sample, expected.sample).max()))
        on_nodes += found.stats.node_rounds
    return worst, on_nodes


def test_no_timestep_is_left_out(mixture: Any, ddim: Any, relative_error: Any) -> None:
    model = mixture(SHAPE, components=10)
    for sigma in (0.0, 0.05):
        worst, on_nodes = largest_error(model, ddim(20), relative_error, sigma)
        assert (worst <= TOL, on_nodes) == (True, 0)


@pytest.mark.parametrize("sigma", [0.0, 0.05])
def test_with_a_draft_all_timesteps_are_nodes(mixture: Any, ddim: Any, relative_error: Any, sigma: float) -> None:
    model = mixture(SHAPE, components=10)
    y = Downsample(4).A(0.5 * torch.randn(4, *SHAPE, generator=generator(3)))
    restorer = dq.DEQRestorer(
        model, ddim(20, 0.5), Downsample(4), sigma=sigma, method="ddrm", draft=mixture(SHAPE, components=10), window=20,
        solver="draft",
    )  # fmt: skip
    expected, found = (solve(y, generator=generator(1)) for solve in (restorer.serial, restorer.restore))
    assert bool(found.converged.all())
    assert float(relative_error(found.sample, expected.sample).max()) <= TOL
    assert (found.stats.node_rounds >= 4, found.stats.timesteps_evaluated) == (True, 1.0)
    assert found.stats.rounds <= 5


def test_memory_that_has_no_room_for_all_timesteps_is_refused(mixture: Any, ddim: Any) -> None:
    restorer = dq.DEQRestorer(mixture(SHAPE), ddim(20), Downsample(4), method="ddrm")
    y = torch.zeros(1, 3, 2, 2)
    with pytest.raises(ValueError, match="a model that is smooth in time"):
        dq.DEQRestorer(mixture(SHAPE), ddim(20), Downsample(4), method="ddrm", memory="offload")
    assert bool(restorer.restore(y).converged.all())
