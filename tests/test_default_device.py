"""Under `torch.set_default_device` everything is as without: our tables lie on the CPU, a user's code finds its own."""

from __future__ import annotations

import pytest
import torch
from entry_points import NOISE, RUNS, SIGMAS, Net, schedule

import deqdiff_fast as dq


@pytest.fixture
def elsewhere():
    """To be called where the default device should become another one: no number can be read there."""
    yield lambda: torch.set_default_device("meta")
    torch.set_default_device(None)
    vars(torch._GLOBAL_DEVICE_CONTEXT).pop("device_context", None)  # torch 2.6 keeps a None that others trip over


def network():
    return Net(lambda: torch.empty(0).device.type).requires_grad_(False)


IMAGES = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(2))


def tables():
    chain = dq.Schedule.from_sigmas(SIGMAS)
    slope = dq.SpectralSlope.fit(IMAGES)
    return torch.cat([chain.slope(0.5), chain.path_error(), schedule().denoised_coef()[:, 0], slope.variance.flatten()])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", RUNS)
def test_results_are_those_without_it_and_a_model_finds_its_own(name, elsewhere):
    net = network()
    expected = RUNS[name](net)
    assert net.found == {"cpu"}
    net.found.clear()
    elsewhere()
    found = RUNS[name](net)
    torch.set_default_device(None)
    assert found.device.type == "cpu"
    assert (found - expected).norm() <= 1e-3 * expected.norm()
    assert net.found == {"meta"}


def test_tables_are_those_without_it(elsewhere):
    expected = tables()
    elsewhere()
    found = tables()
    torch.set_default_device(None)
    assert torch.equal(found, expected)


def test_callbacks_find_it_and_it_is_back_afterwards(elsewhere):
    found = []
    net = network()
    elsewhere()
    dq.DEQSampler(net, schedule(), solver="picard").sample(
        NOISE, callback=lambda info: found.append(torch.empty(0).device.type)
    )
    assert set(found) == {"meta"}
    assert torch.empty(0).device.type == "meta"
    with pytest.raises(ValueError, match="tol"):
        dq.DEQSampler(net, schedule(), tol=-1.0)
    assert torch.empty(0).device.type == "meta"


def test_a_diffusers_scheduler_is_probed(elsewhere):
    diffusers = pytest.importorskip("diffusers")
    for rule in ("DDIMScheduler", "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler"):
        scheduler = getattr(diffusers, rule)()
        expected = dq.Schedule.from_diffusers(scheduler, 9)
        elsewhere()
        found = dq.Schedule.from_diffusers(scheduler, 9)
        torch.set_default_device(None)
        for field in ("state_coef", "model_coef", "noise_coef", "signal", "sigma"):
            assert torch.equal(getattr(found, field), getattr(expected, field)), (rule, field)
