"""Options of inversion by descent: what is refused, and the presets of papers."""

from __future__ import annotations

import pytest
import torch
from descent_cases import Bend, invert

import deqdiff_fast as dq
from deqdiff_fast.inversion import Optimise
from deqdiff_fast.inversion.counting_model import CountingModel
from deqdiff_fast.presets import INVERSION_PRESETS, inversion_preset


def test_counting():
    model = CountingModel(lambda x, t: (2 * x,))
    x = torch.ones(3, 2, requires_grad=True)
    out = model(x, torch.zeros(3))
    torch.autograd.grad(out.sum(), x)
    model(x.detach(), torch.zeros(3))
    assert (model.evals, model.calls, model.backpropagations) == (6, 2, 3)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"gradient": "exact"}, ValueError, "gradient"),
        ({"optimizer": 3}, TypeError, "optimizer"),
        ({"lr": 0.0}, ValueError, "lr"),
        ({"steps": 0}, ValueError, "steps"),
        ({"steps": None}, ValueError, "steps"),
        ({"stop": -1.0}, ValueError, "stop"),
        ({"initial": "noise"}, ValueError, "initial"),
        ({"solver": "newton?"}, ValueError, "solver"),
        ({"solver_tol": 0}, ValueError, "solver_tol"),
        ({"baseline": "adjoint"}, ValueError, "baseline"),
        ({"warm_start": 1}, ValueError, "warm_start"),
        ({"finish": None}, ValueError, "finish"),
        ({"epochs": 3}, TypeError, "epochs"),
    ],
)
def test_bad_options(ddim, options, error, message):
    with pytest.raises(error, match=message):
        dq.DEQInverter(Bend(), ddim(5), method="gradient", **options)


def test_bad_values_that_show_later(images):
    schedule, start, image = images()
    with pytest.raises(ValueError, match="initial"):
        invert(schedule, image, initial=start[:2]).invert(image)
    with pytest.raises(TypeError, match="optimizer"):
        invert(schedule, image, optimizer=lambda noises: None).invert(image)


def test_presets_run_the_papers_settings(images):
    """One step of each on a small chain; the numbers against the paper's published configurations."""
    facts = {name: (p.steps, p.eta, p.lr, p.stop, p.tau, p.phantom_steps) for name, p in INVERSION_PRESETS.items()}
    assert facts == {
        "cifar10": (1000, 0.0, 5e-3, 0.5, 0.1, 1),
        "celeba": (20, 0.0, 1e-2, 0.5, 0.1, 1),
        "bedroom": (10, 0.0, 5e-3, 0.5, 0.1, 1),
        "church": (10, 0.0, 5e-3, 0.5, 0.1, 1),
        "cifar10-stochastic": (10, 1.0, 1e-2, 0.5, 0.1, 1),
        "celeba-stochastic": (20, 0.1, 1e-2, 0.5, 0.1, 1),
        "bedroom-stochastic": (10, 0.5, 5e-3, 0.5, 0.1, 1),
        "church-stochastic": (10, 0.5, 5e-3, 0.5, 0.1, 1),
    }
    schedule, _, image = images(steps=20, seed=4)
    chosen = inversion_preset("celeba")
    for options in (chosen.options(), chosen.baseline()):
        found = dq.DEQInverter(Bend(), schedule, **options | {"steps": 2}).invert(image)
        assert found.stats.steps == 2
    assert found.stats.backpropagations == 2 * 3 * 20
    with pytest.raises(ValueError, match="celeba-stochastic"):
        inversion_preset("imagenet")


def test_options_are_those_of_the_method():
    assert Optimise().name == "gradient, implicit"
    assert Optimise(baseline="bptt").name == "bptt"
    assert Optimise().exact
    assert not Optimise(stop=0.5).exact
