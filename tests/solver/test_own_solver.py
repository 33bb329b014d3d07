"""A solver outside of the library: the one of the documentation's page "Extending", and the least that one needs.

`RelaxedPicard` stands in tests/solvers.py and is in the list there, so that every solver test runs on it too.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch
from solvers import RelaxedPicard

import deqdiff_fast as dq
from deqdiff_fast.engine import solve
from deqdiff_fast.kernels import ddim_update
from deqdiff_fast.loop.task import Lookahead
from deqdiff_fast.solver import Solver

LOOPS = pytest.mark.parametrize("policy", [None, Lookahead(near=0.0)], ids=["host", "device"])


class Plain(Solver):
    """Picard iteration in the fewest lines: no memory, no settings, no name."""

    def step(self, chain, memory, round):
        ddim_update(
            chain.states, chain.predictions, chain.state_coef, chain.model_coef, chain.lo, chain.hi,
            chain.sq_diff, chain.sq_norm, chain.drift, backend=chain.backend,
        )  # fmt: skip


def test_the_page_shows_the_solver_that_is_tested():
    page = (Path(__file__).resolve().parents[2] / "docs" / "extending.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    (shown,) = (block for block in blocks if "class RelaxedPicard" in block)
    assert shown.endswith(inspect.getsource(RelaxedPicard))
    body = [line for line in inspect.getsource(RelaxedPicard).splitlines() if line.strip()]
    assert len(body) <= 30


@LOOPS
@pytest.mark.parametrize("window", ["auto", 12])
@pytest.mark.parametrize("solver", [Plain(), RelaxedPicard(), RelaxedPicard(weight=1.2)], ids=["plain", "0.8", "1.2"])
def test_the_serial_sample(monkeypatch, mixture, ddim, noise, relative_error, solver, window, policy):
    monkeypatch.setattr(solve, "lookahead_policy", lambda system, request: policy)
    sampler = dq.DEQSampler(mixture(), ddim(40, eta=0.3), solver=solver, window=window, tol=1e-4)
    out = sampler.sample(noise(3), generator=torch.Generator().manual_seed(0))
    serial = sampler.serial(noise(3), generator=torch.Generator().manual_seed(0)).sample
    assert out.converged.all()
    assert out.stats.finished_serially == 0
    assert out.stats.solver == type(solver).__name__.lower()
    assert relative_error(out.sample, serial).max() <= 1e-4


def test_the_least_is_picard(mixture, ddim, noise):
    """The same rounds and the same numbers, where both hold rows to the same."""
    found = [
        dq.DEQSampler(mixture(), ddim(40), solver=solver, tol=1e-5).sample(noise(2), return_trajectory=True)
        for solver in (Plain(), dq.Picard(safety=Solver.safety, freeze=Solver.freeze))
    ]
    assert found[0].stats.rounds == found[1].stats.rounds
    assert torch.equal(found[0].trajectory, found[1].trajectory)


def test_damping_takes_fewer_rounds(mixture, ddim, noise):
    """What the page says of it."""
    rounds = {
        solver: dq.DEQSampler(mixture(), ddim(100), solver=solver).sample(noise(3)).stats.rounds
        for solver in (RelaxedPicard(weight=0.8), RelaxedPicard(weight=1.0))
    }
    assert rounds[RelaxedPicard(weight=0.8)] < 0.7 * rounds[RelaxedPicard(weight=1.0)]


def test_gradients_pass_through_it(bent, noise):
    abar = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    schedule = dq.Schedule.ddim(abar, torch.arange(9).flip(0) * 100, prediction_type="v_prediction")
    model, found = bent(), []
    for solver in (RelaxedPicard(), "picard"):
        start = noise(2, (6,)).double().requires_grad_(True)
        dq.DEQSampler(model, schedule, solver=solver, tol=1e-9).sample(start).sample.square().sum().backward()
        found.append(start.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-7)


def test_what_is_no_solver_is_refused(mixture, ddim, noise):
    with pytest.raises(TypeError, match=r"solver: expected a name or an object .* got object"):
        dq.DEQSampler(mixture(), ddim(10), solver=object())
    with pytest.raises(TypeError, match="Solver has neither step"):
        dq.DEQSampler(mixture(), ddim(10), solver=Solver()).sample(noise(1))
