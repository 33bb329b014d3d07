"""Which timesteps a round asks the model about.

The remainder of a prediction, in units of the clean sample, is smooth in the logarithm l of the noise-to-signal ratio.
Local cubic interpolation of it between nodes h apart is wrong by about h^4, and an error at a timestep counts as much
as the chain carries of it to the sample, w. Nodes that share the error evenly have the density |l'|^(4/5) w^(1/5). What
is rough in time whatever the noise level, such as a network's embedding of the timestep, wants an even share: `EVEN`.
What is interpolated is a polynomial in the sum of |l'|^(4/5), in which such nodes lie about evenly: `abscissae`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..schedule import Schedule

EVEN = 0.2
TYPICAL_VARIANCE = 0.25  # of data scaled to [-1, 1], for the weight of an error
FIRST, SECOND = 9, 17  # nodes of the first two rounds
FEWEST_STEPS = 10  # of a chain that is worth rounds on nodes
SHORT = 16  # timesteps of a chain all of which are nodes in the end
RENEWED, ALONE = 0.016, 0.12  # see `is_noisy`: with a draft, and without one
HALF, MORE = 45, 90  # nodes of the rounds that follow: T HALF / (T + HALF), or with MORE, see `round_sizes`
DENSEST = 2  # times the usual number of nodes, at most
LOOSE = 1e-2, 1e-1  # tolerances from which and up to which HALF becomes less: interpolation errs by about n^-2
TILT, MOST_TILTED = 0.5, 4  # by what part, and how often that, of what nodes have seen their density is tilted
FEWEST_SEEN = 4  # nodes
SHIFT = 0.25  # how far nodes are moved, in intervals
GOLDEN = 0.6180339887498949  # multiples of it spread out evenly
POWER = 0.8  # of the changes of l, in the abscissae and in the density
LEAST_MOVE = 0.1  # between two abscissae, of that on the mean: steps may repeat a noise level
RATIO_RANGE = (1e-4, 1e4)  # noise-to-signal ratios beyond count as these
LEAST_WEIGHT = 1e-8  # of an error that does not count, relative to the largest


def round_sizes(steps: int, noisy: bool = False, smooth: bool = True, rough: bool = False, tol: float = 0) -> list[int]:
    """Numbers of nodes of the first rounds; the last one stands for those that follow, as long as these nodes do.

    noisy: whether a chain adds so much noise between nodes that all timesteps are nodes after one round, where a draft
    makes that the faster way. smooth: whether the model is smooth in time; else all are nodes in every round. rough:
    whether a chain adds noise between nodes, and nothing but slopes follows it there. tol: a larger one has fewer.
    """
    if not smooth:
        return [steps]
    half = MORE if rough else HALF * (LOOSE[0] / min(max(tol, LOOSE[0]), LOOSE[1])) ** 0.5
    first, last = ((usual_nodes(steps),), steps) if noisy else ((FIRST, SECOND), usual_nodes(steps, half))
    return [n for n in first if 5 * n < 4 * last] + [last]


def usual_nodes(steps: int, half: float = HALF) -> int:
    return steps if steps <= SHORT else round(half * steps / (steps + half))


def most_nodes(steps: int, sizes: list[int]) -> int:
    """How many nodes a round may have where there is no room for all timesteps; sizes: see `round_sizes`."""
    return min(DENSEST * max(sizes[-1], usual_nodes(steps)), steps)


def is_noisy(schedule: Schedule, most: float = RENEWED) -> bool:
    """Whether a chain is `noisy`: by what is renewed of a state's noise from node to node, of which more than `most` is
    allowed where nodes are few, for there they save more."""
    size, part = schedule.sigma[1:], usual_nodes(schedule.num_steps) / schedule.num_steps
    renewed = torch.where(size > 0, schedule.noise_coef / size, 0).square().clamp_max(1).mean()
    return bool(renewed * (1 - part) > most * part**0.5)


def density(schedule: Schedule) -> Tensor:
    """(T,) float64 with sum 1: how the nodes of a chain should be spread."""
    steps = schedule.num_steps
    width = torch.zeros(steps, dtype=torch.float64)
    if steps > 1:  # the largest of the two steps on either side: what is interpolated here goes by nodes beyond them
        moved = _moves(schedule)
        width = torch.cat([moved[:1].expand(2), moved, moved[-1:].expand(2)]).unfold(0, 4, 1).amax(1)
    weight = influence(schedule).abs()
    weight = (weight / weight.max()).clamp_min(LEAST_WEIGHT)
    shape = width**POWER * weight ** (1 - POWER)
    total = shape.sum()
    even = torch.full_like(shape, 1 / steps)
    return even if not total > 0 else (1 - EVEN) * shape / total + EVEN * even


def abscissae(schedule: Schedule) -> Tensor:
    """(T,) float64, from 0 on: what remainders are a smooth function of, a change of 1 a step on the mean."""
    moved = _moves(schedule) ** POWER
    moved = torch.where(moved.sum() > 0, moved / moved.mean(), 1).clamp_min(LEAST_MOVE)
    return torch.cat([torch.zeros(1, dtype=torch.float64), moved.cumsum(0)])


def _moves(schedule: Schedule) -> Tensor:
    """(T - 1,): by how much the logarithm of the noise-to-signal ratio changes from one timestep to the next."""
    ratio = schedule.sigma[:-1] / schedule.signal[:-1].clamp_min(1e-300)
    return ratio.clamp(*RATIO_RANGE).log().diff().abs()


def tilted(density: Tensor, nodes: tuple[int, ...], missed: list[float]) -> Tensor:
    """The density, tilted along the chain so that what interpolation misses is shared out more evenly.

    missed: of every node, as it was seen there, of what is not asked up to the next; it goes with the fifth power of an
    interval. One number is taken of it, in coarse steps, for it was seen far from the solution, and for solves of one
    model to have the same nodes.
    """
    at = torch.tensor([*nodes, len(density)])
    gap = at.diff().double()
    seen = (gap > 1) & (torch.tensor(missed) > 0)
    if int(seen.sum()) < FEWEST_SEEN:
        return density
    passed = density.cumsum(0) - density / 2
    place = passed[at[:-1][seen]] - passed[at[:-1][seen]].mean()
    whole = (torch.tensor(missed, dtype=torch.float64)[seen] * (gap / (gap - 1))[seen]).log() / 5
    tilt = float((place * (whole - whole.mean())).sum() / place.square().sum())
    shape = density * (passed * min(max(round(tilt / TILT), -MOST_TILTED), MOST_TILTED) * TILT).exp()
    return shape / shape.sum()


def influence(schedule: Schedule) -> Tensor:
    """(T,): what the sample takes of an error in the clean sample that is predicted at each timestep."""
    slope = schedule.slope(TYPICAL_VARIANCE)[:, None]
    q = schedule.denoised_coef()[:, 1]
    return adjoint(schedule.state_coef, schedule.model_coef, slope)[:, 0] / _nonzero(q)


def prediction_weight(schedule: Schedule, least: Tensor | None = None) -> Tensor:
    """(T,): relative error of the sample if a prediction is wrong by its own size, or by `least`: (T,) if that is more.

    At least as much as it moves the next state: a linear model forgets early errors, which a network need not do.
    """
    variance, signal, sigma = TYPICAL_VARIANCE, schedule.signal, schedule.sigma
    p, q = schedule.denoised_coef().unbind(1)
    size = (variance * (1 - p * signal[:-1]).square() + (p * sigma[:-1]).square()).sqrt() / _nonzero(q).abs()
    size = size if least is None else torch.maximum(size, least)
    next_state = (variance * signal[1:].square() + sigma[1:].square()).sqrt().clamp_min(1e-300)
    slope = schedule.slope(variance)[:, None]
    to_sample = adjoint(schedule.state_coef, schedule.model_coef, slope)[:, 0]
    return size * torch.maximum(to_sample.abs() / variance**0.5, schedule.model_coef[:, 0].abs() / next_state)


def error_weight(schedule: Schedule) -> Tensor:
    """(T,): the same, for a prediction that is wrong by its own size, or the clean sample by that if that is more."""
    return prediction_weight(schedule, TYPICAL_VARIANCE**0.5 / _nonzero(schedule.denoised_coef()[:, 1]).abs())


def _nonzero(q: Tensor) -> Tensor:
    return torch.where(q == 0, 1, q)


def adjoint(state_coef: Tensor, model_coef: Tensor, slope: Tensor) -> Tensor:
    """(T, K): d sample / d remainder of each timestep, for predictions slope[i] x_i + remainder[i]; slope: (T, K)."""
    steps, lags = state_coef.shape
    found = torch.zeros(steps, slope.shape[1], dtype=torch.float64)
    carried = torch.zeros(lags, slope.shape[1], dtype=torch.float64)  # d sample / d x_{i+1}, x_i, ...
    carried[0] = 1
    for i in range(steps - 1, -1, -1):
        before = torch.cat([carried[1:], torch.zeros_like(carried[:1])])
        for lag in range(min(lags, i + 1)):
            found[i - lag] += model_coef[i, lag] * carried[0]
            before[lag] += (state_coef[i, lag] + model_coef[i, lag] * slope[i - lag]) * carried[0]
        carried = before
    return found


def equidistribute(weight: Tensor, count: int) -> list[int]:
    """`count` distinct timesteps that part the weight, (T,) > 0, evenly; the first and the last are among them.

    They are moved by up to a quarter of an interval, each another way: what is periodic in time, as a network's
    embedding of it makes its errors, would else add up where its period is that of the nodes, and no estimate could see
    it.
    """
    steps, count = len(weight), min(count, len(weight))
    if count == 1:
        return [0]
    taken = torch.zeros(steps, dtype=torch.bool)
    taken[0] = taken[-1] = True
    while True:  # those whose share is a node or more are nodes; the others share out what is left
        left = count - int(taken.sum())
        rest = weight.masked_fill(taken, 0)
        whole = (rest * left >= rest.sum()) & ~taken
        if left <= 0 or not bool(whole.any()):
            break
        taken |= whole
    free = (~taken).nonzero()[:, 0]
    number = torch.arange(1, left + 1, dtype=torch.float64)
    moved = (number * GOLDEN % 1 - 0.5) * 2 * SHIFT
    reached = (rest.cumsum(0) - rest / 2)[free].contiguous()
    nodes, open_ones, least = taken.nonzero()[:, 0].tolist(), free.tolist(), 0
    for k, at in enumerate(torch.searchsorted(reached, (number + moved) / (left + 1) * rest.sum()).tolist()):
        chosen = min(max(at, least), len(open_ones) - left + k)
        nodes.append(open_ones[chosen])
        least = chosen + 1
    return sorted(nodes)


def refine(nodes: list[int], score: list[float], count: int) -> list[int]:
    """Up to `count` more nodes, in the middle of the intervals on both sides of those with the largest score."""
    known = set(nodes)
    for j in sorted(range(len(nodes)), key=lambda j: -score[j]):
        for left, right in ((j - 1, j), (j, j + 1)):
            if len(known) == len(nodes) + count:
                return sorted(known)
            if left >= 0 and right < len(nodes):
                known.add((nodes[left] + nodes[right]) // 2)
    return sorted(known)


def walk_between(steps: int, nodes: int) -> float:
    """What linear interpolation misses of a random walk of `steps` steps, up to a factor: the sum of a Brownian bridge
    over the whole numbers between 0 and g has a variance as g^3 - g, and there is one a node, of g = steps / nodes."""
    gap = steps / nodes
    return float((nodes * max(gap**3 - gap, 0.0)) ** 0.5)
