"""The first active row: where it moves, later residuals say nothing, and the model alone decides what it becomes."""

from __future__ import annotations

import copy

import pytest
import torch
from solvers import SOLVERS
from torch import Tensor, nn

import deqdiff_fast as dq
from deqdiff_fast.engine import solve
from deqdiff_fast.kernels import advance_window
from deqdiff_fast.loop.stopping import StoppingRule
from deqdiff_fast.loop.task import Lookahead
from deqdiff_fast.loop.window import Window

SAMPLES = 40


class SharpMixture:
    """The exact posterior mean of well separated points in D dimensions: one early step decides which of them."""

    def __init__(self, abar: Tensor, size: int = 64, points: int = 4, deviation: float = 0.1) -> None:
        draw = torch.Generator().manual_seed(0)
        self.abar, self.variance = abar, deviation**2
        self.means = torch.randn(points, size, generator=draw, dtype=torch.float64)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        signal, noise = self.abar[t].sqrt()[:, None], (1 - self.abar[t]).sqrt()[:, None]
        total = signal.square() * self.variance + noise.square()
        offset = x[:, None] - signal[:, :, None] * self.means
        share = (-offset.square().sum(-1) / (2 * total)).softmax(1)
        return (share[..., None] * (self.means + (signal * self.variance / total)[:, :, None] * offset)).sum(1)


def plain_chain(model, schedule: dq.Schedule, x: Tensor) -> Tensor:
    for i in range(schedule.num_steps):
        e = model(x, schedule.timesteps[i].expand(len(x)))
        x = schedule.state_coef[i, 0] * x + schedule.model_coef[i, 0] * e
    return x


def abar() -> Tensor:
    return (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)


@pytest.mark.parametrize("policy", [None, Lookahead(near=0.0)], ids=["host", "device"])
@pytest.mark.parametrize("case", SOLVERS, ids=str)
@pytest.mark.parametrize("steps", [6, 10])
def test_no_sample_of_another_mode_is_called_converged(case, steps, policy, monkeypatch):
    monkeypatch.setattr(solve, "lookahead_policy", lambda system, request: policy)
    model = SharpMixture(abar())
    timesteps = (1000 - torch.arange(steps) * 1000 / steps).round().long() - 1
    schedule = dq.Schedule.ddim(abar(), timesteps, prediction_type="sample")
    noise = torch.randn(SAMPLES, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = case.sampler(model, schedule, tol=1e-2).sample(noise)
    off = (found.sample - plain_chain(model, schedule, noise)).norm(dim=1) / found.sample.norm(dim=1)
    assert found.converged.all()
    assert off.max() <= 1e-2


# relative residuals of T = 6 rows, the first active row, and the first row after that is not final then; freeze 0.01
WINDOWS = [
    ([9.0, 9.0, 2.0, 0.0, 0.0, 0.0], 2, 3),  # the first row moved: nothing is known about those after it
    ([9.0, 9.0, 0.005, 0.0, 0.0, 0.0], 2, 6),
    ([9.0, 9.0, 0.02, 0.005, 0.0, 0.0], 2, 6),  # short enough to end, though not to freeze
    ([9.0, 9.0, 0.005, 0.001, 0.5, 0.0], 2, 4),
    ([9.0, 9.0, 9.0, 9.0, 9.0, 3.0], 5, 6),  # the last row
    ([9.0, 9.0, float("nan"), 0.0, 0.0, 0.0], 2, 3),
]


@pytest.mark.parametrize(("residual", "low", "front"), WINDOWS)
def test_host_and_device_decide_alike_about_the_first_row(residual, low, front):
    window = Window(6, 1, 6)
    window.lo = [low]
    known = torch.tensor(residual, dtype=torch.float64)
    bad = (~known.isfinite()).cumsum(0) > 0
    rule, seen = StoppingRule(0.01, 0.03), torch.where(bad, torch.inf, known)
    worst = rule.advance(window, [seen.tolist()])
    lo, hi = torch.tensor([low], dtype=torch.int32), torch.tensor([6], dtype=torch.int32)
    previous_bounds, decision, rows = (
        torch.zeros(2, 1, dtype=torch.int32),
        torch.zeros(4, 1, dtype=torch.float64),
        torch.zeros(7).long(),
    )
    advance_window(
        known[:, None].square(), torch.ones(6, 1).double(), lo, hi, previous_bounds, decision, rows, 0.01, 0.03, 6
    )
    assert (window.lo, lo.tolist()) == ([front], [front])
    assert float(decision[3, 0]) == pytest.approx(worst[0])


class Deep(nn.Module):
    def __init__(self, size: int = 64, width: int = 256) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.Linear(size + 1, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, size)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layers(torch.cat([x, t[:, None].to(x.dtype) / 1000], 1)) + 0.7 * x


def noisy(model):
    draw = torch.Generator().manual_seed(0)
    return lambda x, t: model(x, t) * (1 + 0.3 * torch.randn(x.shape, generator=draw))


def by_batch(model):
    """As quantisation with a scale for the whole batch does."""

    def draft(x: Tensor, t: Tensor) -> Tensor:
        out = model(x, t)
        scale = out.abs().max() / 127
        return (out / scale).round() * scale

    return draft


@pytest.mark.parametrize("history", [0, 3])
@pytest.mark.parametrize("tol", [1e-2, 1e-3, 1e-5])
@pytest.mark.parametrize("kind", [noisy, by_batch])
def test_a_draft_that_contradicts_itself_does_not_decide_the_sample(kind, tol, history):
    model = Deep().eval().requires_grad_(False)
    schedule = dq.Schedule.ddim(abar(), torch.linspace(0, 999, 20).round().long().flip(0))
    noise = torch.randn(2, 64, generator=torch.Generator().manual_seed(4))
    expected = plain_chain(copy.deepcopy(model).double(), schedule, noise.double())
    solver = dq.Drafted(history=history)
    found = dq.DEQSampler(model, schedule, solver=solver, draft=kind(model), tol=tol).sample(noise)
    off = (found.sample.double() - expected).norm(dim=1) / expected.norm(dim=1)
    assert found.converged.all()
    assert off.max() <= tol
