"""Tables as they are kept: spacings, private copies, digits, and the generator that goes with them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from deqdiff_fast import DEQSampler
from deqdiff_fast.schedule import Clip, Schedule, timesteps

ABAR = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)


def test_spacings():
    assert timesteps(1000, 4).tolist() == [750, 500, 250, 0]
    assert timesteps(1000, 4, "trailing").tolist() == [999, 749, 499, 249]
    assert timesteps(1000, 4, "linspace").tolist() == [999, 666, 333, 0]
    assert timesteps(1000, 4, "quad").tolist() == [800, 355, 88, 0]
    for spacing in ("leading", "trailing", "linspace", "quad"):
        full = timesteps(1000, 1000, spacing)
        assert full.dtype == torch.int64
        assert full.shape == (1000,)
        assert (full.diff() <= 0).all()
    diffusers = pytest.importorskip("diffusers")
    for spacing in ("leading", "trailing", "linspace"):
        for n in (1, 7, 50, 333, 1000):
            scheduler = diffusers.DDIMScheduler(timestep_spacing=spacing)
            scheduler.set_timesteps(n)
            assert torch.equal(timesteps(1000, n, spacing), scheduler.timesteps), (spacing, n)


def test_a_repeated_timestep_is_a_step_that_does_nothing():
    schedule = Schedule.ddim(ABAR, [500, 500, 100], eta=1.0)
    assert schedule.state_coef[0, 0].item() == pytest.approx(1)
    assert schedule.model_coef[0, 0].item() == pytest.approx(0, abs=1e-15)
    assert schedule.noise_coef[0] == 0


def test_the_tables_are_private_copies():
    abar, steps = ABAR.clone(), timesteps(1000, 10)
    schedule = Schedule.ddim(abar, steps)
    steps += 1
    abar.zero_()
    assert torch.equal(schedule.timesteps, timesteps(1000, 10))
    gain = torch.ones(10)
    fields = {name: getattr(schedule, name) for name in ("timesteps", "input_scale", "state_coef", "model_coef",
                                                         "noise_coef", "signal", "sigma")}  # fmt: skip
    clipped = Schedule(**fields, clip=Clip(1.0, gain))
    gain.zero_()
    assert (clipped.clip.gain == 1).all()
    assert clipped.state_coef.data_ptr() != schedule.state_coef.data_ptr()
    with pytest.raises(AttributeError):
        clipped.name = "other"
    for name in ("input_scale", "state_coef", "model_coef", "noise_coef", "signal", "sigma"):
        assert getattr(schedule, name).dtype == torch.float64
    assert Schedule(**fields | {"timesteps": torch.rand(10)}).timesteps.dtype == torch.float64


def without_noise() -> Schedule:
    """A chain whose scheduler draws at every step, for coefficients that are zero."""
    given = Schedule.ddim(ABAR, [900, 500, 100])
    return dataclasses.replace(given, draws=torch.ones(3, dtype=torch.bool))


@pytest.mark.parametrize("way", ["sample", "serial", "unrolled"])
@pytest.mark.parametrize("several", [False, True])
def test_a_generator_ends_where_the_scheduler_would_have_left_it(noise, way, several):
    """Draws that count for nothing are made all the same; without a generator none are."""
    start = noise(2, (4,)).requires_grad_(way == "unrolled")
    sampler = DEQSampler(lambda x, t: 0.1 * x, without_noise(), gradient="unrolled")
    solve = sampler.serial if way == "serial" else sampler.sample
    given = [torch.Generator().manual_seed(k) for k in range(2)] if several else [torch.Generator().manual_seed(0)]
    solve(start, None, given if several else given[0])
    for seed, generator in enumerate(given):
        own = torch.Generator().manual_seed(seed)
        for _ in range(3):
            torch.randn(1 if several else 2, 4, generator=own)
        assert torch.equal(own.get_state(), generator.get_state())
    before = torch.get_rng_state()
    solve(start)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "kind", [list, tuple, np.array, lambda values: [torch.tensor(v, dtype=torch.float64) for v in values]]
)
def test_plain_numbers_keep_all_of_their_digits(kind):
    """torch makes float32 of a list of floats, which is not what tolerances below 1e-7 are asked of."""
    sigmas, alphas = [0.9, 0.7, 1 / 3, 0.1, 0.0], [0.99, 0.9, 2 / 3, 0.1]
    exact = Schedule.from_sigmas(torch.tensor(sigmas, dtype=torch.float64), flow=True)
    given = Schedule.from_sigmas(kind(sigmas), flow=True)
    tables = [
        (given, exact),
        (Schedule.ddim(kind(alphas), [3, 2, 0]), Schedule.ddim(torch.tensor(alphas, dtype=torch.float64), [3, 2, 0])),
    ]
    own = {"timesteps": kind([0.3, 0.1]), "input_scale": kind([1.0, 0.7]), "state_coef": kind([[0.9], [0.3]]),
           "model_coef": kind([[0.1], [1 / 3]]), "noise_coef": kind([0.1, 0.0]), "signal": kind([0.1, 0.3, 1.0]),
           "sigma": kind([1.0, 0.7, 0.1])} if kind in (list, tuple, np.array) else {}  # fmt: skip
    if own:
        wide = {name: torch.tensor(np.array(value, dtype=np.float64)) for name, value in own.items()}
        tables.append((Schedule(**own), Schedule(**wide)))
    for found, wanted in tables:
        for name in ("timesteps", "input_scale", "state_coef", "model_coef", "noise_coef", "signal", "sigma"):
            assert torch.equal(getattr(found, name), getattr(wanted, name)), name
