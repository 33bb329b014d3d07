"""Inversion by descent: it finds the noise, stops image by image, and is what it says it is."""

from __future__ import annotations

import pytest
import torch
from descent_cases import Bend, invert

import deqdiff_fast as dq

LBFGS = {"optimizer": torch.optim.LBFGS, "lr": 1.0, "steps": 12}


@pytest.mark.parametrize("gradient", ["implicit", "unrolled", "reversible", dq.Phantom(1.0, 9)], ids=str)
def test_finds_the_noise(images, gradient, relative_error):
    schedule, start, image = images()
    found = invert(schedule, image, gradient=gradient, **LBFGS).invert(image)
    assert found.converged.all()
    assert found.error.max() <= 1e-3
    assert relative_error(found.noise, start).max() <= 1e-2
    assert found.stats.steps < 12
    assert found.stats.stop_reason == "converged"
    assert torch.allclose(found.trajectory[0], found.noise)
    assert torch.allclose(found.trajectory[-1], image, atol=1e-2)


@pytest.mark.parametrize("generator", ["one", "list"])
@pytest.mark.parametrize("baseline", [None, "bptt"])
def test_frozen_noise_whoever_is_left_in_the_batch(images, generator, baseline):
    schedule, _, image = images(eta=1.0)
    draws = torch.Generator().manual_seed(5)
    if generator == "list":
        draws = [torch.Generator().manual_seed(k) for k in (5, 6, 7)]
        sampler = dq.DEQSampler(Bend(), schedule, solver="quasi-newton")
        image = sampler.serial(torch.randn(3, 2, 4, 4), generator=[torch.Generator().manual_seed(k) for k in (5, 6, 7)])
        image = image.sample
    found = invert(schedule, image, baseline=baseline, optimizer=torch.optim.Adam, lr=0.3, steps=200, tol=2e-2).invert(
        image, generator=draws
    )
    last = found.stats.losses[-1]
    assert found.converged.all()
    assert (found.error <= 2e-2).all()
    assert found.stats.model_evals < found.stats.steps * 3 * 8 * 12
    # the losses of the descent are those of the true chain, so the draws were right
    assert torch.allclose((last / image.flatten(1).square().sum(1)).sqrt(), found.error, rtol=0.05, atol=1e-3)


def test_images_that_are_done_leave(images):
    """An image that starts at its solution costs one evaluation; its noise stays as it is."""
    schedule, start, image = images(batch=3)
    begin = start.clone()
    begin[1:] += 0.5 * torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    sizes = []

    class Sizes(Bend):
        def __call__(self, x, t):
            if torch.is_grad_enabled() and x.requires_grad:
                sizes.append(len(x))
            return super().__call__(x, t)

    method = {"baseline": "bptt", "initial": begin, "lr": 0.05, "steps": 200, "tol": 5e-2}
    found = invert(schedule, image, Sizes(), **method).invert(image)
    assert found.converged.all()
    assert torch.equal(found.noise[0], start[0])
    assert sizes[0] == 3
    assert sizes[-1] < 3
    assert (found.stats.losses[:, 0] == found.stats.losses[0, 0]).all()
    single = invert(schedule, image, **method | {"initial": begin[1:2]}).invert(image[1:2])
    assert torch.allclose(single.noise, found.noise[1:2], atol=1e-5)  # Adam: an image for itself


def test_the_best_noise_is_kept(images):
    """A step length at which the loss goes up and down."""
    schedule, start, image = images()
    begin = start + 0.1
    found = invert(schedule, image, initial=begin, optimizer=torch.optim.SGD, lr=30.0, steps=6).invert(image)
    losses = found.stats.losses
    assert (losses[-1] > losses.amin(0)).any()
    assert torch.allclose(found.error, (losses.amin(0) / image.flatten(1).square().sum(1)).sqrt(), rtol=1e-2, atol=1e-5)
    assert found.stats.stop_reason == "max_rounds"
    assert not found.converged.any()


def test_an_exploding_descent_returns_what_it_had(images):
    schedule, start, image = images()
    found = invert(schedule, image, initial=start + 0.1, optimizer=torch.optim.SGD, lr=1e30, steps=6).invert(image)
    assert found.noise.isfinite().all()
    assert found.error.isfinite().all()
    assert not found.converged.any()
    assert found.stats.notes
    assert torch.allclose(found.noise, start + 0.1)


def test_the_serial_baseline_counts_and_agrees(images):
    schedule, start, image = images()
    method = {"initial": start + 0.2, "optimizer": torch.optim.SGD, "lr": 0.05, "steps": 4}
    serial = invert(schedule, image, baseline="bptt", **method).invert(image)
    implicit = invert(schedule, image, gradient="implicit", solver_tol=1e-6, **method).invert(image)
    assert torch.allclose(serial.noise, implicit.noise, atol=1e-5)
    assert serial.stats.backpropagations == 4 * 3 * 8
    assert serial.stats.model_evals == 2 * 4 * 3 * 8  # forwards, and again for the activations
    assert serial.stats.rounds == 4 * 8
    assert serial.stats.steps == 4
    assert serial.stats.losses.shape == (4, 3)
    assert (serial.stats.seconds.diff() > 0).all()
    phantom = invert(schedule, image, gradient="phantom", **method).invert(image)
    assert phantom.stats.backpropagations == 0


def test_max_batch_bounds_every_call(images):
    schedule, start, image = images()
    seen = []

    class Sizes(Bend):
        def __call__(self, x, t):
            seen.append(len(x))
            return super().__call__(x, t)

    for options in ({"baseline": "bptt"}, {"gradient": "implicit"}, {"gradient": "reversible"}):
        invert(schedule, image, Sizes(), max_batch=2, steps=1, initial=start + 0.1, **options).invert(image)
    assert max(seen) == 2


def test_warm_starts_save_rounds(images):
    schedule, start, image = images(steps=20)
    method = {"initial": start + 0.3, "optimizer": torch.optim.SGD, "lr": 0.01, "steps": 6, "solver": "quasi-newton"}
    warm, cold = (invert(schedule, image, warm_start=warm, **method).invert(image).stats for warm in (True, False))
    assert warm.rounds < cold.rounds


@pytest.mark.parametrize("initial", ["ddim", "random", "equilibrium"])
def test_initial_noise(images, initial):
    schedule, _, image = images(steps=20)
    found = invert(schedule, image, initial=initial, seed=3, steps=1).invert(image)
    if initial == "random":
        expected = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(3))
    else:
        expected = dq.DEQInverter(Bend(), schedule, method=initial).invert(image).noise
        assert f"initial noise by {initial}" in found.stats.notes
    assert torch.equal(found.noise, expected)


def test_a_given_trajectory_goes_first(images):
    schedule, start, image = images()
    known = dq.DEQSampler(Bend(), schedule).serial(start, return_trajectory=True).trajectory
    found = invert(schedule, image, initial=torch.zeros_like(start)).invert(image, init_trajectory=known)
    assert found.stats.steps == 1
    assert torch.equal(found.noise, start)


def test_a_loose_chain_is_taken_further(images):
    """The descent believes its own sample; where the serial chain disagrees, those images go on, and only those."""
    schedule, start, image = images(steps=20)
    begin = start.clone()
    begin[1:] += 0.2
    loose = {"solver": "picard", "solver_tol": 0.7, "steps": 400, "lr": 0.02, "warm_start": False}
    found = invert(schedule, image, initial=begin, tol=1e-2, **loose).invert(image)
    assert any("taken further" in remark for remark in found.stats.notes)
    assert found.noise.isfinite().all()
    assert found.error[0] <= 1e-2


def test_conditions_follow_their_images(images):
    shift = torch.tensor([[-1.0], [0.0], [1.0]])
    schedule, start, image = images(shift=shift)
    begin = start.clone()
    begin[1:] += 0.2  # the first image is done at once; the others must keep their own shifts
    adam = {"lr": 0.05, "steps": 100, "tol": 2e-2}
    found = invert(schedule, image, initial=begin, **adam).invert(image, {"shift": shift})
    assert found.converged.all()
    assert torch.equal(found.noise[0], start[0])


def test_a_callback_sees_and_stops(images):
    schedule, start, image = images()
    seen = []

    def record(info):
        seen.append((info.residual.max().item(), info.noise().shape))
        return len(seen) == 3

    found = invert(schedule, image, initial=start + 0.3, steps=50).invert(image, callback=record)
    assert len(seen) == 3
    assert seen[2][0] < seen[0][0]
    assert seen[0][1] == image.shape
    assert found.stats.stop_reason == "callback"
    assert found.stats.steps == 3


def test_a_model_with_parameters_gets_no_gradients(images, ddim):
    body = torch.nn.Linear(32, 32)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body = body

        def forward(self, x, t):
            return 0.5 * x + 0.1 * self.body(x.flatten(1)).view_as(x)

    image = torch.randn(2, 2, 4, 4).clamp(-1, 1)
    invert(ddim(5), image, Model(), steps=2).invert(image)
    assert all(p.grad is None for p in body.parameters())
