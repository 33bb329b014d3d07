"""What holds of every solver, with the decisions on the host and on the device."""

from __future__ import annotations

import itertools

import pytest
import torch
from solvers import SOLVERS

import deqdiff_fast as dq
from deqdiff_fast.engine import solve
from deqdiff_fast.loop.task import Lookahead
from deqdiff_fast.solver import NAMED

pytestmark = pytest.mark.usefixtures("rows_are_known")

HOST, DEVICE = None, Lookahead(near=0.0)
LOOPS = pytest.mark.parametrize("policy", [HOST, DEVICE], ids=["host", "device"])
WINDOWED = [case for case in SOLVERS if case.windows]


def test_every_name_is_in_the_list():
    assert {case.solver for case in SOLVERS if isinstance(case.solver, str)} == {*NAMED} - {"auto"}
    assert len({case.name for case in SOLVERS}) == len(SOLVERS)


@pytest.mark.parametrize(
    ("steps", "eta", "window", "policy"),
    [
        (20, 0.0, "auto", HOST),
        (50, 0.5, 15, HOST),
        (100, 0.0, "auto", HOST),
        (24, 0.5, 9, DEVICE),
        (24, 0.0, "auto", DEVICE),
    ],
)
@pytest.mark.parametrize("case", SOLVERS, ids=str)
def test_reaches_the_serial_sample(monkeypatch, mixture, ddim, noise, relative_error, case, steps, eta, window, policy):
    monkeypatch.setattr(solve, "lookahead_policy", lambda system, request: policy)
    steps = min(steps, 24) if case.slow else steps
    model, schedule, start = mixture(), ddim(steps, eta), noise(3)
    for tol in (1e-2, 1e-4):
        sampler = case.sampler(model, schedule, tol=tol, window=window if case.windows else "auto")
        serial = sampler.serial(start, generator=torch.Generator().manual_seed(1)).sample
        out = sampler.sample(start, generator=torch.Generator().manual_seed(1))
        assert out.converged.all()
        assert out.stats.solver == sampler.solver.name
        assert relative_error(out.sample, serial).max() <= tol
        assert out.stats.finished_serially == 0 or not case.finishes
        if case.every_row:
            assert out.stats.rounds < steps + (case.name == "anderson")  # weights for each timestep: as many as steps


@pytest.mark.parametrize("case", [case for case in SOLVERS if case.multistep], ids=str)
def test_reaches_the_serial_sample_of_a_multistep_chain(mixture, karras, noise, relative_error, case):
    schedule = dq.Schedule.from_sigmas(karras(20), method="dpmpp_2m")
    start = noise(2) * schedule.init_noise_sigma

    def model(x, t):  # the noise in unit Gaussian data
        level = t.view(-1, 1, 1, 1)
        return x * level / (1 + level.square())

    sampler = case.sampler(model, schedule, tol=1e-4)
    out = sampler.sample(start)
    assert out.converged.all()
    assert relative_error(out.sample, sampler.serial(start).sample).max() <= 1e-4


@pytest.mark.parametrize("window", [29, 8, 1])
@pytest.mark.parametrize("case", WINDOWED, ids=str)
def test_every_round_makes_a_state_final_that_is_not_evaluated_again(mixture, ddim, noise, case, window):
    """Windows, because no coarse rounds come before them."""
    model, fronts = mixture(), [[0, 0]]
    sampler = case.sampler(model, ddim(30), window=window, **{"draft": mixture()} if case.drafted else {})
    out = sampler.sample(noise(2), callback=lambda info: fronts.append(info.front.tolist()))
    rounds = out.stats.rounds
    for old, new in itertools.pairwise(fronts[: rounds + 1]):
        assert all(b > a or a == 30 for a, b in zip(old, new))
    in_rounds = sum(min(30, lo + window) - lo for both in fronts[:rounds] for lo in both)
    assert out.stats.model_evals == model.rows == in_rounds + sum(30 - lo for lo in fronts[rounds])


@LOOPS
@pytest.mark.parametrize("case", SOLVERS, ids=str)
def test_a_model_that_fails_is_named(monkeypatch, mixture, ddim, noise, case, policy):
    monkeypatch.setattr(solve, "lookahead_policy", lambda system, request: policy)
    model = mixture()

    def broken(x, t):
        out = model(x, t)
        out[t == 450] = float("nan")
        return out

    with pytest.raises(dq.NonFiniteError, match=r"NaN or Inf at timestep 450 .*, sample 0"):
        case.sampler(broken, ddim(20)).sample(noise(2))
