"""Inversions with settings drawn at random: what they say of themselves is what a chain written out here says."""

from __future__ import annotations

import random
import warnings
from functools import partial

import pytest
import torch

import deqdiff_fast as dq
from deqdiff_fast.inversion import Equilibrium

ABAR = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
D, CASES = 4, 8
WEIGHT = 0.4 * torch.randn(2, D, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Network:
    """A small model with a condition, and a table that all samples share, of `size` rows."""

    def __init__(self, levels: bool, size: int) -> None:
        self.levels, self.size = levels, size

    def __call__(self, x, t, cond=None, table=None, offset=0.0):
        hidden = x + offset
        if cond is not None:
            assert len(cond) in (1, len(x)), "one row for all, or one for each row of the call"
            hidden = hidden + cond.to(x)
        if table is not None:
            assert len(table) == self.size, "a shared table stays as it is"
            hidden = hidden + 0.1 * table.sum(0).to(x)
        bent = torch.tanh(hidden @ WEIGHT[0].to(x)) @ WEIGHT[1].to(x)
        if self.levels:
            level = t.to(x)[:, None]
            return x / (1 + level**2) + 0.1 * bent / (1 + level)
        return 0.5 * x * (1 - ABAR.to(x)[t][:, None]).sqrt() + 0.3 * bent


def draw_schedule(pick: random.Random) -> dq.Schedule:
    steps, kind = pick.randint(1, 8), pick.choice(["ddim", "eta", "euler", "dpmpp_2m"])
    if kind in ("ddim", "eta"):
        return dq.Schedule.ddim(ABAR, torch.arange(steps).flip(0) * (1000 // steps), eta=0.5 * (kind == "eta"))
    sigmas = [*torch.logspace(1, -1, steps, dtype=torch.float64).tolist(), 0.0]
    return dq.Schedule.from_sigmas(sigmas, method=kind)


def draw_model(pick: random.Random, levels: bool, batch: int, draw: torch.Generator):
    """(model, model_kwargs, the same as a plain function of x and t)."""
    network, given = Network(levels, 5 if batch != 2 else 1), {}
    rows = pick.choice([0, 1, batch])
    if rows:
        given["cond"] = torch.randn(rows, D, generator=draw)
    if pick.random() < 0.4:
        given["table"] = torch.randn(network.size, D, generator=draw)
    if pick.random() < 0.4:
        given["offset"] = pick.choice([0.2, torch.tensor(0.2)])
    if "cond" not in given or pick.random() < 0.4:
        return network, given, lambda x, t: network(x, t, **given)
    cond, uncond = {"cond": given.pop("cond")}, {"cond": torch.zeros(pick.choice([1, rows]), D)}
    scale = pick.choice([1.0, 2.0, torch.linspace(1, 2, batch)])

    def plain(x, t):
        low, high = network(x, t, **uncond, **given), network(x, t, **cond, **given)
        return low + (scale[:, None].to(x) if isinstance(scale, torch.Tensor) else scale) * (high - low)

    return dq.guided(network, cond, uncond, scale), given, plain


def chain(model, schedule, noise, generator):
    """The serial chain by the schedule's tables, in float64; the noise on the way as a sampler of `noise` draws it."""
    states, outs = [noise.double()], []
    for i in range(schedule.num_steps):
        outs.append(model(states[-1] * schedule.input_scale[i], schedule.timesteps[i].expand(len(noise))))
        x = torch.zeros_like(states[0])
        for lag in range(min(schedule.lags, i + 1)):
            x = x + schedule.state_coef[i, lag] * states[i - lag] + schedule.model_coef[i, lag] * outs[i - lag]
        if bool(schedule.draws[i]):
            x = x + schedule.noise_coef[i] * torch.randn(noise.shape, generator=generator, dtype=noise.dtype)
        states.append(x)
    return states[-1]


def draw_method(pick: random.Random, method: str) -> dict:
    if method != "gradient":
        return {}
    optimizer = pick.choice([{"lr": 0.05}, {"optimizer": partial(torch.optim.LBFGS, max_iter=2)}])
    gradient, initial = pick.choice(["implicit", "unrolled"]), pick.choice(["ddim", "equilibrium", "random"])
    return {"steps": 2, "gradient": gradient, "initial": initial, "baseline": pick.choice([None, "bptt"]), **optimizer}


@pytest.mark.parametrize("method", ["equilibrium", "auto", "fixed_point", "ddim", "gradient"])
def test_the_error_is_that_of_the_serial_chain(method, relative_error):
    for seed in range(CASES if method != "gradient" else 2):
        pick, draw = random.Random(f"{method} {seed}"), torch.Generator().manual_seed(seed)
        schedule, batch = draw_schedule(pick), pick.randint(1, 3)
        model, given, plain = draw_model(pick, schedule.timesteps.is_floating_point(), batch, draw)
        image = torch.randn(batch, D, generator=draw, dtype=torch.float64) * torch.tensor([[0.2], [1.0], [3.0]])[:batch]
        settings = {
            "window": pick.choice(["auto", *range(1, schedule.num_steps + 1)]), "max_batch": pick.choice([None, 1, 3]),
            "max_rounds": pick.choice([None, 1, 2, 3]), "tol": pick.choice([1e-2, 1e-5]),
            "on_failure": pick.choice(["serial", "warn", "raise"]), **draw_method(pick, method),
        }  # fmt: skip
        generator = torch.Generator().manual_seed(7) if schedule.stochastic else None
        inverter = dq.DEQInverter(model, schedule, method, **settings)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", dq.ConvergenceWarning)
            try:
                inv = inverter.invert(image, given or None, generator)
            except dq.NotConvergedError as error:
                inv = error.solution
        error = relative_error(chain(plain, schedule, inv.noise, torch.Generator().manual_seed(7)), image)
        assert torch.allclose(inv.error, error, rtol=1e-4, atol=1e-8), (seed, settings)
        assert torch.equal(inv.converged, inv.error <= settings["tol"]), (seed, settings)


class Believing:
    """The equilibrium, but for the first time spoilt for `size` of the samples: these are taken further."""

    name, exact = "believing", True

    def __init__(self, size: int) -> None:
        self.size, self.batches = size, []

    def solve(self, problem):
        result = Equilibrium().solve(problem)
        if not self.batches:
            result.noise[: self.size] = 0
        self.batches.append(problem.batch)
        result.converged[:] = True
        return result


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("size", [1, 2])
def test_conditions_of_samples_that_are_taken_further(ddim, noise, size, guided):
    """Each keeps its own; a shared tensor of as many rows as there are such samples has not become theirs."""
    network, cond = Network(False, size), {"cond": noise(3, (D,))}
    given = {"table": noise(size, (D,), seed=1), **({} if guided else cond)}
    model = dq.guided(network, cond, {"cond": torch.zeros(1, D)}, torch.tensor([1.0, 2.0, 3.0])) if guided else network
    method = Believing(size)
    inv = dq.DEQInverter(model, ddim(5), method).invert(noise(3, (D,), seed=2, dtype=torch.float64), given)
    assert method.batches == [3, size]
    assert inv.converged.all()


def test_a_descent_with_a_guided_model(ddim, noise):
    guided = dq.guided(Network(False, 0), {"cond": noise(2, (D,))}, {"cond": torch.zeros(1, D)}, 2.0)
    inv = dq.DEQInverter(guided, ddim(5), "gradient", steps=1, solver="picard").invert(noise(2, (D,), seed=1))
    assert inv.stats.steps == 1


def test_windows_smaller_than_the_stiff_part():
    """EDM's levels, whose steps are all stiff."""
    schedule = dq.Schedule.from_sigmas(torch.tensor([80.0, 20, 5, 1.5, 0.5, 0.2, 0.05, 0.0]))
    for window in range(1, 8):
        inverter = dq.DEQInverter(lambda x, sigma: x / (1 + sigma[:, None] ** 2), schedule, window=window)
        assert inverter.invert(torch.full((2, 6), 0.5)).converged.all(), window


class Still(torch.optim.SGD):
    """Never evaluates anything."""

    def step(self, closure=None):
        return None


@pytest.mark.parametrize("settings", [{"max_rounds": 5}, {"optimizer": Still, "steps": 2}], ids=str)
def test_a_descent_without_an_evaluation_hands_over_its_start(ddim, settings):
    inverter = dq.DEQInverter(Network(False, 0), ddim(9), "gradient", **settings)
    inv = inverter.invert(torch.full((2, D), 0.3))
    assert inv.stats.losses.shape == (0, 2)
    assert inv.stats.stop_reason == "max_rounds"
    assert inv.noise.isfinite().all()


@pytest.mark.parametrize("options", [{}, {"gradient": "unrolled"}, {"baseline": "bptt"}], ids=str)
def test_a_descent_leaves_no_gradients_behind(ddim, bent, options):
    network, cond = bent(), torch.zeros(2, 6, dtype=torch.float64, requires_grad=True)
    image = torch.full((2, 6), 0.3, dtype=torch.float64, requires_grad=True)
    dq.DEQInverter(network, ddim(4), "gradient", steps=2, **options).invert(image, {"cond": cond})
    assert [x.grad for x in (cond, image, *network.parameters())] == [None] * 6
