"""Inversions that fail or are asked for wrongly."""

from __future__ import annotations

import pytest
import torch

import deqdiff_fast as dq
from deqdiff_fast.inversion import FixedPoint
from deqdiff_fast.inversion.base import InversionStats, MethodResult

SHAPE = (3, 8, 8)


def pictures(model, schedule, batch: int = 2, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Images like the model's, but none that its chain makes: samples with some grain."""
    draw = torch.Generator().manual_seed(3)
    start, grain = torch.randn(2, batch, *SHAPE, generator=draw, dtype=torch.float64)
    sample = dq.DEQSampler(model, schedule).serial(start, generator=draw).sample
    return (sample + 0.05 * grain).to(dtype)


class Folding:
    """A model whose step folds and expands: no nearby state maps to a given image."""

    def __call__(self, x, t):
        return 40 * torch.sin(30 * x) + 25 * x


@pytest.mark.parametrize("method", ["equilibrium", "fixed_point", "ddim"])
def test_a_hopeless_inversion_is_said(ddim, method):
    image = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    inv = dq.DEQInverter(Folding(), ddim(10), method, max_rounds=40).invert(image)
    assert not inv.converged.any()
    assert inv.noise.isfinite().all()
    assert (inv.error > 1e-3).all()


def test_on_failure(mixture, ddim):
    image = pictures(mixture(), ddim(20))
    short = {"max_rounds": 2}
    with pytest.raises(dq.NotConvergedError, match="2 of 2 images are not reproduced") as raised:
        dq.DEQInverter(mixture(), ddim(20), on_failure="raise", **short).invert(image)
    assert isinstance(raised.value.solution, dq.Inversion)
    with pytest.warns(dq.ConvergenceWarning, match="not reproduced"):
        inv = dq.DEQInverter(mixture(), ddim(20), on_failure="warn", **short).invert(image)
    assert not inv.converged.any()
    inv = dq.DEQInverter(mixture(), ddim(20), **short).invert(image)
    assert inv.converged.all()
    assert inv.stats.finished_serially == 20
    assert "row by row" in inv.stats.notes[0]


@pytest.mark.parametrize("method", ["equilibrium", "fixed_point"])
def test_a_model_gone_wrong(mixture, ddim, method):
    sound = mixture()

    def model(x, t):
        return torch.where((t == 100)[:, None, None, None], float("nan"), sound(x, t))

    with pytest.raises(dq.NonFiniteError, match="timestep 100"):
        dq.DEQInverter(model, ddim(20), method).invert(pictures(sound, ddim(20)))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(0, *SHAPE), "at least one image"),
        (torch.full((1, *SHAPE), float("nan")), "expected finite values"),
        (torch.full((1, *SHAPE), 255.0), "scale pixels to"),
        (torch.zeros((1, *SHAPE), dtype=torch.uint8), "scale pixels to"),
        (torch.zeros(1, 4, 8, 8), "shape .*3, 8, 8"),
        (torch.zeros(8), "expected shape"),
    ],
)
def test_bad_images(mixture, ddim, image, message):
    spectrum = dq.SpectralSlope.fit(torch.randn(4, *SHAPE))
    with pytest.raises(ValueError, match=message):
        dq.DEQInverter(mixture(), ddim(5), spectrum=spectrum).invert(image)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "newton"}, ValueError, "method: expected one of 'auto', 'ddim', 'equilibrium'"),
        ({"method": 3}, TypeError, "a name or a method object"),
        ({"iterations": 3}, TypeError, "iterations: method 'equilibrium' has no such option"),
        ({"method": FixedPoint(), "iterations": 3}, TypeError, "options go to the method object"),
        ({"method": "fixed_point", "iterations": 0}, ValueError, "iterations: expected an int >= 1"),
        ({"history": 8}, ValueError, "history: expected an int from 0 to 7"),
        ({"slope": "steep"}, ValueError, "slope: expected"),
        ({"damping": 0.0}, ValueError, "damping: expected a number > 0"),
        ({"patience": 0}, ValueError, "patience: expected"),
        ({"tol": -1.0}, ValueError, "tol: expected"),
        ({"window": 0}, ValueError, "window: expected"),
        ({"on_failure": "shrug"}, ValueError, "on_failure: expected"),
        ({"spectrum": 1.0}, TypeError, "spectrum: expected"),
    ],
)
def test_bad_arguments(mixture, ddim, options, error, message):
    with pytest.raises(error, match=message):
        dq.DEQInverter(mixture(), ddim(5), **options)


def test_a_clipping_schedule_reaches_its_range_only(mixture, ddim):
    from dataclasses import replace

    from deqdiff_fast.schedule import Clip

    schedule = ddim(10)
    clipped = replace(schedule, clip=Clip(1.0, torch.zeros(10)))
    with pytest.raises(ValueError, match="the schedule clips there"):
        dq.DEQInverter(mixture(), clipped).invert(torch.full((1, *SHAPE), 1.5))


def test_a_descent_under_inference_mode_is_refused(mixture, ddim):
    inverter = dq.DEQInverter(mixture(), ddim(5), "gradient")
    with torch.inference_mode(), pytest.raises(RuntimeError, match="method: 'gradient': expected torch"):
        inverter.invert(torch.zeros(1, *SHAPE))


def test_what_a_method_wrongly_believes_is_not_said(mixture, ddim):
    class Hopeful(FixedPoint):
        def solve(self, problem):
            sure = torch.ones(problem.batch, dtype=torch.bool)
            return MethodResult(problem.image, None, sure, InversionStats("hopeful", 1))

    found = dq.DEQInverter(mixture(), ddim(5), Hopeful()).invert(torch.ones(2, *SHAPE))
    assert not found.converged.any()
    assert found.stats.stop_reason == "max_rounds"
