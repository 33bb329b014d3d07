"""Chains whose steps are of very different sizes, one beside the other: what is interpolated is smooth in the noise
level, not in the number of a timestep."""

from __future__ import annotations

import pytest
import torch

import deqdiff_fast as dq
from deqdiff_fast.nodes.grid import LEAST_MOVE, abscissae

ABAR = (1 - torch.linspace(1e-2, 0.02**0.5, 1000, dtype=torch.float64).square()).cumprod(0)
TRAIN = len(ABAR)


class Clusters:
    """E[eps | x] of data in narrow clusters."""

    def __init__(self, count, deviation, shape):
        self.centres = torch.randn(count, *shape, generator=torch.Generator().manual_seed(0)).flatten(1).double()
        self.variance = deviation**2

    def __call__(self, x, t):
        flat, abar = x.flatten(1).double(), ABAR[t][:, None]
        total, away = abar * self.variance + 1 - abar, flat[:, None] - abar.sqrt()[..., None] * self.centres
        share = (-away.square().sum(2) / (2 * total)).softmax(1)
        return ((1 - abar).sqrt() / total * (share[..., None] * away).sum(1)).to(x.dtype).view_as(x)


def fours(steps):
    """Four timesteps beside each other, then a gap."""
    return ((torch.arange(steps) // 4) * (4 * TRAIN // steps) + torch.arange(steps) % 4).flip(0)


def pairs(steps):
    return (torch.arange(steps) // 2 * (2 * TRAIN // steps) + torch.arange(steps) % 2).flip(0)


def repeated(steps):
    return (torch.arange(steps // 2) * (2 * TRAIN // steps)).flip(0).repeat_interleave(2)


@pytest.mark.parametrize("timesteps", [fours, pairs, repeated])
@pytest.mark.parametrize(("count", "deviation"), [(1, 0.5), (2, 0.5), (5, 0.1)])
def test_what_calls_itself_converged_is(noise, relative_error, timesteps, count, deviation):
    sampler = dq.DEQSampler(
        Clusters(count, deviation, (4, 16)), dq.Schedule.ddim(ABAR, timesteps(200)), solver="quasi-newton"
    )
    found = sampler.sample(start := noise(8, shape=(4, 16), seed=1))
    error = relative_error(found.sample, sampler.serial(start).sample)
    assert bool((error[found.converged] < 1e-2).all())
    assert found.stats.node_rounds > 0


def test_abscissae_follow_the_noise_level():
    even, uneven, twice = (
        abscissae(dq.Schedule.ddim(ABAR, make(200))).diff()
        for make in (lambda steps: torch.arange(0, TRAIN, TRAIN // steps).flip(0), fours, repeated)
    )
    assert float((even[1:] / even[:-1]).max()) < 3
    assert float(uneven[3:100:4].min() / uneven[:100].view(25, 4)[:, :3].max()) > 4  # the gaps, the steps between them
    assert float(twice[::2].max()) == pytest.approx(LEAST_MOVE)
    assert abscissae(dq.Schedule.ddim(ABAR, [500])).tolist() == [0.0]
