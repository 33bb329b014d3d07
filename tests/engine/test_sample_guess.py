"""A student's sample as the first guess: fewer rounds where it is good, the same sample whatever it is."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import deqdiff_fast as dq

SHAPE = (3, 8, 8)


class Mixture(torch.nn.Module):
    """The exact epsilon prediction for a mixture of three Gaussians of images; counts its rows."""

    def __init__(self, schedule: dq.Schedule) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(5)
        shape = dq.SpectralSlope.fit(torch.randn(64, *SHAPE, generator=draw).cumsum(2).cumsum(3) / 8)
        rows = torch.randn(3, math.prod(SHAPE), generator=draw) * shape.variance.flatten().sqrt().float()
        self.means = shape.basis().inverse(rows.clone()).double()
        self.tables = torch.stack([schedule.timesteps.double(), schedule.signal[:-1], schedule.sigma[:-1]])
        self.rows = 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.rows += len(x)
        at = (self.tables[0][None] - t[:, None].double()).abs().argmin(1)
        s, sigma = self.tables[1, at][:, None, None], self.tables[2, at][:, None, None]
        variance = s**2 * 0.05 + sigma**2
        apart = x.double().flatten(1)[:, None] - s * self.means[None]
        weight = (-apart.square().sum(-1, keepdim=True) / (2 * variance)).softmax(1)
        return (sigma * (weight * apart / variance).sum(1, keepdim=True)).view_as(x).to(x.dtype)


def ddim(steps: int, eta: float = 0.0) -> dq.Schedule:
    alphas = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    return dq.Schedule.ddim(alphas, torch.arange(steps).flip(0) * (1000 // steps), eta=eta)


def dpm(steps: int) -> dq.Schedule:
    sigmas = torch.cat([torch.logspace(1.3, -1.5, steps), torch.zeros(1)])
    return dq.Schedule.from_sigmas(sigmas, "dpmpp_2m", prediction_type="epsilon")


def apart(a: Tensor, b: Tensor) -> float:
    return float(((a - b).flatten(1).double().norm(dim=1) / b.flatten(1).double().norm(dim=1)).max())


def awful(noise: Tensor) -> dict[str, Tensor]:
    """Guesses that are of no use."""
    return {
        "zeros": torch.zeros_like(noise),
        "noise": noise,
        "huge": 100 * torch.randn(noise.shape, generator=torch.Generator().manual_seed(1)),
        "constant": torch.full_like(noise, -7.0),
    }


@pytest.mark.parametrize("kind", ["zeros", "noise", "huge", "constant"])
@pytest.mark.parametrize(
    ("settings", "schedule"),
    [
        ({"solver": "quasi-newton"}, ddim(60)),
        ({"solver": "quasi-newton", "certify": "full"}, ddim(60)),
        ({"solver": "quasi-newton", "window": 20}, ddim(60)),
        ({"solver": "quasi-newton"}, ddim(8)),
        ({"solver": "quasi-newton"}, dpm(40)),
        ({"solver": "quasi-newton"}, ddim(40, 0.5)),
        ({"solver": "picard"}, ddim(30)),
        ({"solver": "anderson", "window": 10}, ddim(30)),
        ({"solver": "triangular"}, ddim(30)),
        ({"solver": "parareal"}, ddim(30)),
        ({}, ddim(60)),
        ({"solver": "draft"}, ddim(60)),
    ],
    ids=["nodes", "full", "window", "short", "multistep", "stochastic", "picard", "anderson", "triangular", "parareal",
         "planned", "draft"],
)  # fmt: skip
def test_an_awful_guess_changes_nothing(settings: dict, schedule: dq.Schedule, kind: str) -> None:
    model = Mixture(schedule)
    noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0)) * schedule.init_noise_sigma
    draw = lambda: torch.Generator().manual_seed(3)  # noqa: E731
    with torch.no_grad():
        exact = dq.DEQSampler(model, schedule).serial(noise, generator=draw()).sample
        draft = (lambda x, t: 0.9 * model(x, t)) if settings.get("solver") == "draft" else None
        sampler = dq.DEQSampler(model, schedule, tol=1e-3, draft=draft, **settings)
        found = sampler.sample(noise, generator=draw(), init=awful(noise)[kind])
    assert bool(found.converged.all())
    assert apart(found.sample, exact) < 1e-3


def test_a_good_guess_is_closer_after_every_round_and_ends_no_later() -> None:
    schedule = ddim(100)
    model = Mixture(schedule)
    sampler = dq.DEQSampler(model, schedule, solver="quasi-newton")
    noise = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0))
    exact = sampler.serial(noise).sample
    sampler.sample(noise)  # the first solve of a model looks at more timesteps
    student = exact + 0.1 * exact.flatten(1).norm(dim=1).view(-1, 1, 1, 1) / 192**0.5 * torch.randn(
        exact.shape, generator=torch.Generator().manual_seed(2)
    )
    errors: dict[str, list[float]] = {}
    rounds = {}
    for name, init in {"none": None, "student": student}.items():
        told = errors.setdefault(name, [])
        found = sampler.sample(
            noise, init=init, callback=lambda info, told=told: told.append(apart(info.sample(), exact))
        )
        rounds[name] = found.stats.rounds
        assert apart(found.sample, exact) < 1e-2
    assert rounds["student"] <= rounds["none"]
    assert errors["student"][0] < 0.5 * errors["none"][0]


def test_a_student_is_called_like_the_model_and_named_where_it_fails() -> None:
    schedule = ddim(20)
    model, sampler = Mixture(schedule), None
    sampler = dq.DEQSampler(lambda x, t, scale: scale * model(x, t), schedule, solver="quasi-newton")
    noise, asked = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0)), []

    def student(noise: Tensor, scale: float) -> Tensor:
        asked.append((noise.shape, scale))
        return 0.5 * noise

    exact = sampler.serial(noise, {"scale": 1.0}).sample
    assert apart(sampler.sample(noise, {"scale": 1.0}, init=student).sample, exact) < 1e-2
    assert asked == [(noise.shape, 1.0)]
    kwargs = {"scale": 1.0}
    with pytest.raises(ValueError, match="init: expected samples of the noise's shape"):
        sampler.sample(noise, kwargs, init=noise[:1])
    with pytest.raises(ValueError, match="init: expected finite values"):
        sampler.sample(noise, kwargs, init=noise / 0)
    with pytest.raises(TypeError, match="init: expected a tensor, a callable"):
        sampler.sample(noise, kwargs, init="student")
    with pytest.raises(ValueError, match="expected one of them, got both"):
        sampler.sample(noise, kwargs, init=noise, init_trajectory=torch.zeros(21, *noise.shape))


def test_gradients_are_those_without_a_guess() -> None:
    schedule = ddim(20)
    model = Mixture(schedule)
    found = []
    for init in (None, torch.zeros(1, *SHAPE)):
        noise = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(0)).requires_grad_()
        sampler = dq.DEQSampler(model, schedule, solver="quasi-newton", tol=1e-5)
        sampler.sample(noise, init=init).sample.square().sum().backward()
        found.append(noise.grad)
    assert apart(*found) < 1e-3
