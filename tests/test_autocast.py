"""Under `torch.autocast` a model finds it on, and nothing else is rounded by it: as if the model alone used it."""

from __future__ import annotations

import pytest
import torch
from entry_points import NOISE, RUNS, Net, backward, schedule

import deqdiff_fast as dq

DTYPE = torch.bfloat16


class Cast(Net):
    """Notes whether it is on. own: casts itself, whatever the surroundings do."""

    def __init__(self, own):
        super().__init__(lambda: torch.is_autocast_enabled("cpu"))
        self.own = own
        self.requires_grad_(False)

    def forward(self, x, t):
        self.found.add(self.look())
        with torch.autocast("cpu", DTYPE, enabled=self.own or self.look()):
            out = self.layer(x)
        assert out.dtype == DTYPE
        return 0.8 * torch.tanh(out)


def check(found, expected, name):
    """The same, but where calls share weights that autocast remembers: their gradients add up in bfloat16."""
    if "unrolled" in name:
        assert (found - expected).norm() <= 1e-2 * expected.norm()
    else:
        assert torch.equal(found, expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", RUNS)
def test_it_is_for_the_model_alone(name):
    inside, outside = Cast(own=True), Cast(own=False)
    expected = RUNS[name](inside)
    assert inside.found == {False}
    with torch.autocast("cpu", DTYPE):
        found = RUNS[name](outside)
        assert torch.is_autocast_enabled("cpu"), "it is as it was"
    assert outside.found == {True}
    assert found.dtype == expected.dtype
    check(found, expected, name)


@pytest.mark.parametrize("gradient", ["implicit", "unrolled", "reversible"])
def test_a_backward_pass_outside_of_it_casts_the_model_as_on_the_way_there(gradient):
    inside, outside = Cast(own=True), Cast(own=False)
    expected = backward(inside, gradient)
    outside.requires_grad_(True)
    with torch.autocast("cpu", DTYPE):
        sampler = dq.DEQSampler(outside, schedule(), gradient=gradient, tol=1e-4)
        loss = sampler.sample(NOISE).sample.square().sum()
    loss.backward()
    check(outside.layer.weight.grad, expected, gradient)
    assert outside.found == {True}


def test_callbacks_find_it():
    found = []
    sampler = dq.DEQSampler(Cast(own=False), schedule(), solver="picard")
    with torch.autocast("cpu", DTYPE):
        sampler.sample(NOISE, callback=lambda info: found.append(torch.is_autocast_enabled("cpu")))
    assert set(found) == {True}
