"""The estimate of the error: exact where the model is linear in its foretold part, and what it is made of."""

from __future__ import annotations

import math

import pytest
import torch

from deqdiff_fast.nodes.estimate import SLOWEST, USUAL, Estimate, estimate, stalled
from deqdiff_fast.nodes.node_grid import NodeGrid

STEPS, NODES, BATCH, SIZE = 23, [0, 3, 7, 8, 15, 21, 22], 2, 5
CLASSES = torch.tensor([0, 2, 1, 1, 0])


@pytest.fixture
def grid(random_chain):
    return NodeGrid.of(random_chain(STEPS, 1, 3), NODES, torch.float64, torch.device("cpu"))


def made(grid, surprise, remainder, scan, start, shrinking=None):
    states = scan(grid.steps, remainder, start, CLASSES)
    shrinking = torch.ones(len(NODES), BATCH, dtype=torch.float64) if shrinking is None else shrinking
    return states, estimate(grid, CLASSES, surprise, shrinking, remainder, states, *[torch.zeros_like(start)] * 2)


def test_the_next_step_is_what_the_surprises_do_to_the_sample(grid, scan, gaussian):
    start, rest, surprise = gaussian(BATCH, SIZE), gaussian(7, BATCH, SIZE, seed=2), gaussian(7, BATCH, SIZE, seed=3)
    shrinking = gaussian(7, BATCH, seed=4).abs().clamp_max(1)
    states, found = made(grid, surprise, rest, scan, start, shrinking)
    moved = scan(grid.steps, rest + shrinking[..., None] * surprise, start, CLASSES)[-1]
    size = states[-1].norm(dim=1)
    torch.testing.assert_close(found.next_step, (moved - states[-1]).norm(dim=1) / size)
    torch.testing.assert_close(found.step, torch.ones_like(size))  # from a sample of zeros
    assert bool((found.node_surprise.sum(0) >= found.next_step).all())


def test_no_surprise_and_a_smooth_remainder_are_no_error(grid, scan, gaussian, random_chain):
    chain = random_chain(STEPS, 1, 3)
    at, unit = (values[NODES, None, None] for values in (chain.abscissa / STEPS, chain.unit))
    smooth = (1 - at + 2 * at**3) * gaussian(1, BATCH, SIZE) / unit
    _, found = made(grid, torch.zeros(7, BATCH, SIZE).double(), smooth, scan, gaussian(BATCH, SIZE, seed=2))
    assert bool((found.next_step == 0).all())
    assert bool((found.interpolation < 1e-9).all())
    assert bool((found.interpolation >= 0).all())


def test_all_timesteps_leave_nothing_to_interpolate(random_chain, scan, gaussian):
    every = NodeGrid.of(random_chain(STEPS, 1, 3), list(range(STEPS)), torch.float64, torch.device("cpu"))
    rest, start = gaussian(STEPS, BATCH, SIZE), gaussian(BATCH, SIZE, seed=2)
    states, flat = scan(every.steps, rest, start, CLASSES), torch.ones(STEPS, BATCH, dtype=torch.float64)
    found = estimate(every, CLASSES, torch.zeros_like(rest), flat, rest, states, start, start)
    assert bool((found.interpolation < 1e-10).all())


def test_samples_do_not_mix(grid, scan, gaussian):
    start, rest, surprise = gaussian(BATCH, SIZE), gaussian(7, BATCH, SIZE, seed=2), gaussian(7, BATCH, SIZE, seed=3)
    _, both = made(grid, surprise.clone(), rest, scan, start)
    rest, surprise, start = rest.clone(), surprise.clone(), start.clone()
    for values in (rest, surprise, start):
        values[..., 1, :] *= 100
    _, other = made(grid, surprise, rest, scan, start)
    for name in Estimate._fields:
        torch.testing.assert_close(getattr(both, name)[..., 0], getattr(other, name)[..., 0])


def test_growth_counts_beside_the_linear_model(grid, scan, gaussian):
    start, rest, surprise = gaussian(BATCH, SIZE), gaussian(7, BATCH, SIZE, seed=2), gaussian(7, BATCH, SIZE, seed=3)
    states, plain = made(grid, surprise, rest, scan, start)
    growth, flat = gaussian(7, BATCH, seed=4).abs() + 1, torch.ones(7, BATCH, dtype=torch.float64)
    rows = (grid, CLASSES, surprise, flat, rest, states, *[torch.zeros_like(start)] * 2)
    no_more = estimate(*rows, growth=flat)
    torch.testing.assert_close(tuple(no_more)[:-1], tuple(plain)[:-1])
    assert plain.growth.tolist() == [0.0] * BATCH  # not known
    assert no_more.growth.tolist() == [1.0] * BATCH
    found = estimate(*rows, growth=growth)
    torch.testing.assert_close(found.interpolation, plain.interpolation)  # which spots are held against
    torch.testing.assert_close(found.node_roughness, plain.node_roughness * growth)
    torch.testing.assert_close(found.grown, (plain.node_roughness * growth).norm(dim=0))
    moved = scan(grid.steps, rest + growth[..., None] * surprise, start, CLASSES)[-1]
    torch.testing.assert_close(found.next_step, (moved - states[-1]).norm(dim=1) / states[-1].norm(dim=1))


def test_all_zero_is_finite(grid, scan):
    zero = torch.zeros(7, BATCH, SIZE, dtype=torch.float64)
    _, found = made(grid, zero, zero, scan, torch.zeros(BATCH, SIZE, dtype=torch.float64))
    assert all(bool(value.isfinite().all()) for value in found)


def numbers(next_step, step, interpolation=0.0, grown=0.0, along=0.0):
    one = torch.ones(1, 1, dtype=torch.float64)
    values = (torch.tensor([v], dtype=torch.float64) for v in (next_step, interpolation, grown, step, along))
    return Estimate(*values, one, one, one[0])


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.8])
def test_steps_that_shrink_are_a_geometric_series(rate):
    before, now = numbers(rate, 1.0), numbers(rate * rate, rate, along=rate)  # all in one direction
    left = USUAL * sum(rate ** (2 + k) for k in range(400))
    total = now.total(now.rate(before), torch.ones(1, dtype=torch.float64), now.cosine(before))
    torch.testing.assert_close(total, torch.tensor([left], dtype=torch.float64))


@pytest.mark.parametrize("cosine", [-0.4, 0.0, 0.3, 0.9])
@pytest.mark.parametrize("rate", [0.2, 0.6])
def test_steps_add_up_as_far_as_they_go_on_in_one_direction(rate, cosine, gaussian):
    """A sequence each of whose steps has that cosine with the one before and is otherwise random."""
    direction, steps = gaussian(1, 1, 50_000)[0, 0], []
    for k in range(40):
        steps.append(rate**k * direction / direction.norm())
        other = gaussian(1, 1, 50_000, seed=100 + k)[0, 0]
        direction = cosine * direction / direction.norm() + (1 - cosine**2) ** 0.5 * other / other.norm()
    before, now = numbers(rate, 1.0), numbers(rate**2, rate, along=float(steps[0] @ steps[1]))
    total = now.total(now.rate(before), torch.ones(1, dtype=torch.float64), now.cosine(before)).item()
    left = float(torch.stack(steps[2:]).sum(0).norm())
    if cosine < 0:  # what turns back is not believed to go on turning back
        assert USUAL * left < total < USUAL * rate**2 / (1 - rate)
    else:
        assert total == pytest.approx(USUAL * left, rel=2e-2)


@pytest.mark.parametrize("rate", [1.0, 3.0, 1e6])
def test_steps_that_do_not_shrink_are_finite(rate):
    before, now = numbers(1.0, 1.0), numbers(rate, rate, along=rate)
    total = now.total(now.rate(before), torch.ones(1, dtype=torch.float64), now.cosine(before))
    torch.testing.assert_close(total, torch.tensor([USUAL * rate / (1 - SLOWEST)], dtype=torch.float64))


def test_the_slower_of_the_two_rates_counts():
    one = torch.ones(1, dtype=torch.float64)
    torch.testing.assert_close(numbers(0.1, 0.5).rate(numbers(1.0, 1.0)), one * 0.5)
    torch.testing.assert_close(numbers(0.5, 0.1).rate(numbers(1.0, 1.0)), one * 0.5)
    assert numbers(0.0, 0.0).rate(numbers(0.0, 0.0)).item() == 0  # 0 / 0


def test_what_moves_the_sample_to_and_fro_does_not_add_up():
    before = numbers(2e-3, 2e-3)
    assert numbers(2e-3, 2e-3, along=-2e-6).rate(before).item() == 0  # rounding
    assert numbers(2e-3, 2e-3, along=4e-6).rate(before).item() == pytest.approx(1)  # in the same direction
    assert numbers(2e-3, 3e-3, along=-6e-6).rate(before).item() == pytest.approx(1.5)  # more than was foretold
    assert numbers(1e-3, 2e-3, along=-4e-6).rate(before).item() == pytest.approx(1)  # surprises that become smaller


def test_how_far_a_step_goes_on_is_seen(grid, scan, gaussian):
    start, rest = gaussian(BATCH, SIZE), gaussian(7, BATCH, SIZE, seed=2)
    states = scan(grid.steps, rest, start, CLASSES)
    last, before = gaussian(BATCH, SIZE, seed=5), gaussian(BATCH, SIZE, seed=6)
    flat = torch.ones(7, BATCH, dtype=torch.float64)
    found = estimate(grid, CLASSES, torch.zeros_like(rest), flat, rest, states, last, before)
    expected = ((states[-1] - last) * (last - before)).sum(1) / states[-1].square().sum(1)
    torch.testing.assert_close(found.along, expected)


def test_a_round_that_moved_more_than_foretold_scales_what_follows():
    one = torch.ones(1, dtype=torch.float64)
    assert numbers(0.1, 0.6).shortfall(numbers(0.2, 1.0)).item() == pytest.approx(3)
    assert numbers(0.1, 0.1).shortfall(numbers(0.2, 1.0)).item() == 1
    assert numbers(0.0, 0.0).shortfall(numbers(0.0, 0.0)).item() == 1  # 0 / 0
    torch.testing.assert_close(numbers(0.03, 0.2).total(0 * one, 3 * one, one), one * 0.09)
    torch.testing.assert_close(numbers(0.0, 0.0, 0.02).total(0.1 * one, 3 * one, one), one * 0.06)
    torch.testing.assert_close(numbers(0.0, 0.0, 0.02, 0.05).total(0.1 * one, 3 * one, one), one * 0.06)
    torch.testing.assert_close(numbers(0.0, 0.0, 0.02, 0.07).total(0.1 * one, 3 * one, one), one * 0.07)


def test_the_next_step_is_no_twentieth_of_the_last():
    one = torch.ones(1, dtype=torch.float64)
    torch.testing.assert_close(numbers(1e-6, 0.2).total(0 * one, one, one), one * 0.01)
    torch.testing.assert_close(numbers(0.03, 0.2).total(0 * one, one, one), one * USUAL * 0.03)


@pytest.mark.parametrize(
    ("trace", "expected"),
    [
        ([math.inf] * 3 + [0.13, 0.048, 0.014, 0.026, 0.023, 0.011], False),  # by nodes added in the 7th round
        ([math.inf] * 3 + [0.13, 0.1, 0.08, 0.075, 0.07, 0.068], True),
        ([math.inf] * 3 + [0.13, 0.1, 0.08, 0.2, 0.15], True),
        ([math.inf] * 3 + [0.1, 0.1, 0.1, 0.1], False),  # too early
        ([math.inf] * 3 + [0.3, 0.2, 0.1, 0.05, 0.03], False),
    ],
)
def test_stalled(trace, expected):
    assert stalled(trace) is expected
