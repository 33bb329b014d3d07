"""With whom what solves have learned of a model is kept."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import deqdiff_fast as dq

pytestmark = pytest.mark.usefixtures("rows_are_known")


class Guidance(nn.Module):
    """A wrapper that calls what it wraps as this library's own do, and adds something at some timesteps."""

    def __init__(self, network, interval):
        super().__init__()
        self.base_model, self.interval = network, interval

    def forward(self, x, t):
        there = (t > self.interval[0]) & (t < self.interval[1])
        return self.base_model(x, t) + there[:, None].to(x.dtype)


class Half(nn.Module):
    def forward(self, x, t):
        return 0.5 * x


@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: dq.guided(model, {}, {}, 1.0)])
def test_wrappers_of_others_around_one_network_are_models_of_their_own(ddim, noise, relative_error, wrap):
    """The one that was solved before was smooth in time."""
    network = Half()
    for interval in ((0, 0), (400, 412)):
        sampler = dq.DEQSampler(wrap(Guidance(network, interval)), ddim(200), solver="quasi-newton")
        with torch.no_grad():
            found = sampler.sample(noise(2, (64,)))
            exact = sampler.serial(noise(2, (64,)))
        assert found.converged.all()
        assert relative_error(found.sample, exact.sample).max() < 1e-2


def test_one_that_says_how_it_differs_shares_what_is_known(ddim, noise):
    network, looked = Half(), []
    for _ in range(2):
        wrapper = Guidance(network, (0, 0))
        wrapper.deqdiff_variant = "plain"
        looked.append(dq.DEQSampler(wrapper, ddim(200), solver="quasi-newton").sample(noise(2, (64,))).stats)
    assert looked[0].check_evals > looked[1].check_evals
