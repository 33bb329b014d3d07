"""DEQInverter(method="auto"): the faster of two exact methods, by what calls cost and by what was seen."""

from __future__ import annotations

import pytest
import torch

import deqdiff_fast as dq
from deqdiff_fast.inversion import FixedPoint
from deqdiff_fast.inversion.automatic import Automatic, InversionHistory, InversionWork
from deqdiff_fast.planner import measure as cost

pytestmark = pytest.mark.usefixtures("rows_are_known")

SHAPE = (3, 8, 8)


@pytest.fixture
def image(mixture, ddim):
    """Images like the model's, but none that its chain makes: samples with some grain."""
    start, grain = torch.randn(2, 2, *SHAPE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return dq.DEQSampler(mixture(), ddim(20)).serial(start).sample + 0.05 * grain


def price(monkeypatch, of_rows):
    """Calls cost what `of_rows` says, and are not timed."""
    monkeypatch.setattr(cost, "measure", lambda system, noise, rows, **settings: of_rows(rows))


@pytest.mark.parametrize(
    ("of_rows", "chosen"),
    [(lambda rows: 1.0, "equilibrium"), (lambda rows: 1.0 * rows, "fixed_point")],
    ids=["an idle device", "a busy device"],
)
def test_it_takes_the_cheaper_method(mixture, ddim, image, monkeypatch, of_rows, chosen):
    price(monkeypatch, of_rows)
    inv = dq.DEQInverter(mixture(), ddim(20), "auto").invert(image)
    assert inv.stats.solver == chosen
    assert inv.stats.notes[0].startswith(f"{chosen}: ")
    assert inv.converged.all()
    assert inv.error.max() <= 1e-3


def test_it_learns_what_methods_take(mixture, ddim, image, monkeypatch):
    """A method that took longer than the other is predicted to take is not chosen again."""
    price(monkeypatch, lambda rows: 1e-9)  # nobody is as fast as that
    inverter = dq.DEQInverter(mixture(), ddim(20), "auto")
    first = inverter.invert(image).stats.solver
    second = inverter.invert(image).stats.solver
    assert {first, second} == {"equilibrium", "fixed_point"}
    history = InversionHistory()
    history.record("equilibrium", InversionWork(30, 200), 2.0)
    assert history.work["equilibrium"] == InversionWork(30, 200)
    history.record("equilibrium", InversionWork(50, 400), 4.0)
    assert history.work["equilibrium"] == InversionWork(40, 300)
    assert history.correction["equilibrium"] == pytest.approx(3.0)


def test_what_it_measures_is_shared(mixture, ddim, image, monkeypatch):
    """What a call costs is measured once for a model, not once for an inverter."""
    asked = []
    price(monkeypatch, lambda rows: asked.append(rows) or 1.0)
    model = mixture()
    for _ in range(4):
        dq.DEQInverter(model, ddim(20), "auto").invert(image)
    assert asked[0] == 2, "one row an image"
    assert len(asked) <= 3, "and a batch, once more where that became another one"
    assert len(set(asked)) == len(asked)


def test_images_that_the_fixed_point_misses_go_on(mixture, ddim, image, monkeypatch):
    price(monkeypatch, lambda rows: 1.0 * rows)
    hasty = Automatic(fixed_point=FixedPoint(iterations=2))
    inv = dq.DEQInverter(mixture(), ddim(20), hasty).invert(image)
    assert inv.converged.all()
    assert any("2 of 2 samples went on to the equilibrium" in note for note in inv.stats.notes)
    plain = dq.DEQInverter(mixture(), ddim(20), "fixed_point", iterations=2).invert(image)
    assert not plain.converged.any(), "or there is nothing to go on with"
    assert inv.stats.rounds > plain.stats.rounds
    assert inv.trajectory is not None
    assert torch.equal(inv.trajectory[0], inv.noise)


def test_limits_hold(mixture, ddim, image, monkeypatch):
    """max_rounds is for both methods together; a callback stops either."""
    price(monkeypatch, lambda rows: 1.0 * rows)
    hasty = Automatic(fixed_point=FixedPoint(iterations=2))
    inv = dq.DEQInverter(mixture(), ddim(20), hasty, max_rounds=40).invert(image)
    assert inv.stats.rounds == 40
    assert not inv.converged.any()
    stopped = dq.DEQInverter(mixture(), ddim(20), "auto").invert(image, callback=lambda info: info.round >= 3)
    assert stopped.stats.stop_reason == "callback"
    assert 3 <= stopped.stats.rounds < 20, "after the step that it was in"
    assert not any("went on" in note for note in stopped.stats.notes)


def test_a_given_start_is_for_all_steps_at_once(mixture, ddim, image):
    inverter = dq.DEQInverter(mixture(), ddim(20), "auto")
    start = dq.DEQInverter(mixture(), ddim(20)).invert(image).trajectory
    warm = inverter.invert(image, init_trajectory=start)
    assert warm.stats.solver == "equilibrium"
    assert warm.converged.all()
    with pytest.raises(TypeError, match="history"):
        dq.DEQInverter(mixture(), ddim(20), "auto", history=3)
