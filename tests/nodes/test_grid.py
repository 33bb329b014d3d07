"""Which timesteps are nodes: how many, and where."""

from __future__ import annotations

import itertools

import pytest
import torch

from deqdiff_fast import Schedule
from deqdiff_fast.nodes.grid import density, equidistribute, influence, is_noisy, refine, round_sizes, tilted

ABAR = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
ANGLE = torch.linspace(0, 1, 1001, dtype=torch.float64)
COSINE = ((ANGLE + 0.008) / 1.008 * torch.pi / 2).cos().square()[1:].clamp_min(1e-9)


def steps_of(count):
    return torch.arange(count).flip(0) * (1000 // count)


SCHEDULES = {
    "ddim": lambda n: Schedule.ddim(ABAR, steps_of(n)),
    "ddim-eta-1": lambda n: Schedule.ddim(ABAR, steps_of(n), eta=1.0),
    "cosine": lambda n: Schedule.ddim(COSINE, steps_of(n)),
    "cosine-v": lambda n: Schedule.ddim(COSINE, steps_of(n), prediction_type="v_prediction"),
    "no-signal-v": lambda n: Schedule.ddim(
        torch.cat([ABAR[:-1], ABAR.new_zeros(1)]), (999 - torch.arange(n) * (999 // n)), prediction_type="v_prediction"
    ),
    "almost-no-signal": lambda n: Schedule.ddim(ABAR * torch.linspace(1, 1e-6, 1000, dtype=torch.float64), steps_of(n)),
    "euler": lambda n: Schedule.from_sigmas(torch.cat([torch.linspace(80, 0.01, n), torch.zeros(1)])),
    "dpmpp": lambda n: Schedule.from_sigmas(torch.cat([torch.linspace(14, 0.05, n), torch.zeros(1)]), "dpmpp_2m"),
    "flow": lambda n: Schedule.from_sigmas(torch.linspace(1, 0, n + 1), flow=True),
}


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 50, 999])
@pytest.mark.parametrize("name", SCHEDULES)
def test_density_is_one(name, steps):
    found = density(SCHEDULES[name](steps))
    assert found.shape == (steps,)
    assert bool((found >= 0.2 / steps * (1 - 1e-9)).all())  # everywhere at least the even share, and never NaN
    torch.testing.assert_close(found.sum(), torch.ones((), dtype=torch.float64))


def test_density_is_high_where_noise_levels_change_and_errors_count(ddim):
    found = density(ddim(1000))
    assert found[-100:].sum() > 3 * found[450:550].sum()  # towards the image
    assert found[-1] > 10 * found[500]


def test_influence_is_the_gain_of_the_chain(ddim):
    schedule = ddim(12)
    p, q = schedule.denoised_coef().unbind(1)
    slope, x0 = schedule.slope(0.25), torch.zeros(12, dtype=torch.float64, requires_grad=True)
    x = torch.ones((), dtype=torch.float64)
    for i in range(12):  # the error of the clean sample moves the prediction by one over q
        x = schedule.state_coef[i, 0] * x + schedule.model_coef[i, 0] * (slope[i] * x + x0[i] / q[i])
    x.backward()
    torch.testing.assert_close(influence(schedule), x0.grad)
    assert p.isfinite().all()


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 16, 50, 1000])
@pytest.mark.parametrize("count", [1, 2, 3, 9, 17, 33, 2000])
@pytest.mark.parametrize("kind", ["even", "end", "beginning", "spike"])
def test_spread_is_distinct_and_has_the_ends(steps, count, kind):
    at = torch.arange(steps, dtype=torch.float64)
    weight = {
        "even": torch.ones_like(at),
        "end": 1e-6 + (at - steps).div(steps / 40).exp(),
        "beginning": 1e-6 + (-at).div(steps / 40).exp(),
        "spike": torch.full_like(at, 1e-9).index_fill(0, torch.tensor([steps // 2]), 1.0),
    }[kind]
    nodes = equidistribute(weight / weight.sum(), count)
    assert len(nodes) == min(count, steps)
    assert nodes == sorted(set(nodes))
    assert nodes[0] == 0
    if count > 1:
        assert nodes[-1] == steps - 1


def test_spread_follows_the_density():
    weight = torch.cat([torch.full((500,), 1.0), torch.full((500,), 3.0)]).double()
    nodes = equidistribute(weight / weight.sum(), 81)
    assert abs(sum(n < 500 for n in nodes) - 20) <= 1
    parted = torch.tensor([float(weight[a:b].sum()) for a, b in itertools.pairwise(nodes)]) / (weight.sum() / 80)
    assert parted.min() > 0.4
    assert parted.max() < 1.6  # a quarter of an interval at both ends, and the rounding to timesteps


def test_where_there_is_no_room_others_share_what_is_left():
    weight = torch.cat([torch.full((80,), 1.0), torch.full((20,), 30.0)]).double()
    nodes = equidistribute(weight, 40)
    assert nodes[-20:] == list(range(80, 100)), "each of these is worth more than a node"
    assert max(b - a for a, b in itertools.pairwise(nodes)) <= 6, "20 nodes for 80 timesteps that count alike"


def test_the_density_is_tilted_to_where_more_is_missed():
    even = torch.full((100,), 0.01, dtype=torch.float64)
    nodes = tuple(equidistribute(even, 17))
    assert torch.allclose(tilted(even, nodes, [1.0] * 17), even, atol=2e-3)
    early = tilted(even, nodes, [float(2.0 ** -(n / 10)) for n in nodes])
    assert early.sum() == pytest.approx(1)
    assert early[0] > 2 * early[-1]
    assert torch.equal(early, tilted(even, nodes, [1.03 * float(2.0 ** -(n / 10)) for n in nodes])), "in coarse steps"


@pytest.mark.parametrize("missed", [[0.0] * 5, [0.0, 1.0, 1.0, 0.0, 0.0]])
def test_what_was_hardly_seen_tilts_nothing(missed):
    even = torch.full((40,), 0.025, dtype=torch.float64)
    assert tilted(even, (0, 10, 20, 30, 39), missed) is even


def test_spread_has_no_period():
    nodes = torch.tensor(equidistribute(torch.ones(1000, dtype=torch.float64), 51)).double()
    turns = torch.exp(2j * torch.pi * nodes / 20)  # as even nodes would have
    assert turns.mean().abs() < 0.8


def test_refine_adds_where_the_score_is_largest():
    nodes = [0, 10, 20, 30, 40]
    assert refine(nodes, [0.0, 0.0, 5.0, 0.0, 0.0], 2) == [0, 10, 15, 20, 25, 30, 40]
    assert refine(nodes, [0.0, 0.0, 5.0, 0.0, 0.0], 1) == [0, 10, 15, 20, 30, 40]
    assert refine(nodes, [9.0, 0.0, 0.0, 0.0, 8.0], 2) == [0, 5, 10, 20, 30, 35, 40]


@pytest.mark.parametrize("count", [0, 1, 4, 100])
def test_refine_keeps_what_is_there(count):
    nodes = [0, 1, 2, 3, 9, 10, 40]
    more = refine(nodes, [float(j) for j in range(7)], count)
    assert more == sorted(set(more))
    assert set(nodes) <= set(more)
    assert len(more) <= len(nodes) + count
    assert len(more) > len(nodes) or count == 0
    assert refine([0, 1, 2, 3], [1.0] * 4, count) == [0, 1, 2, 3]  # no room


@pytest.mark.parametrize("steps", [1, 2, 3, 8, 16, 17, 20, 50, 100, 250, 1000, 4000])
def test_round_sizes_grow_and_stay_below_the_chain(steps):
    sizes = round_sizes(steps)
    assert sizes == sorted(set(sizes))
    assert sizes[0] >= 1
    assert sizes[-1] <= steps
    assert sizes[-1] == steps or steps > 16
    assert sizes[-1] <= 45


def test_few_nodes_for_a_long_chain():
    assert round_sizes(1000)[-1] * 20 < 1000
    assert len(round_sizes(1000)) == 3


@pytest.mark.parametrize("steps", [17, 20, 50, 100, 1000])
def test_fewer_nodes_for_a_larger_tolerance_and_as_many_for_a_smaller(steps):
    sizes = [round_sizes(steps, tol=tol) for tol in (2e-3, 1e-2, 5e-2, 1e-1, 0.9)]
    last = [found[-1] for found in sizes]
    assert sizes[0] == sizes[1] == round_sizes(steps)
    assert round_sizes(steps, tol=1e-6) == sizes[0]
    assert last[1] > last[2] > last[3] == last[4]
    assert sizes[3] == sorted(set(sizes[3]))
    assert last[3] >= 7
    noisy = [round_sizes(steps, rough=True, tol=tol) for tol in (1e-2, 1e-1)]
    assert noisy[0] == noisy[1], "what noise does between nodes falls by less where there are more"


@pytest.mark.parametrize("steps", [1, 2, 16, 17, 50, 1000])
def test_all_timesteps_where_nothing_is_to_be_interpolated(steps):
    assert round_sizes(steps, smooth=False) == [steps]
    first, *others = round_sizes(steps, noisy=True)
    assert (others or [first]) == [steps]
    assert first == round_sizes(steps)[-1] or not others


@pytest.mark.parametrize(
    ("steps", "eta", "noisy"),
    [(50, 0.0, False), (50, 0.2, False), (20, 0.5, True), (50, 0.3, True), (50, 1.0, True), (200, 0.3, False),
     (1000, 0.3, False), (1000, 0.5, True), (1000, 1.0, True), (16, 1.0, False), (1, 1.0, False)],
)  # fmt: skip
def test_a_chain_is_noisy_where_much_of_its_noise_is_renewed_between_nodes(ddim, steps, eta, noisy):
    assert is_noisy(ddim(steps, eta=eta)) == noisy
