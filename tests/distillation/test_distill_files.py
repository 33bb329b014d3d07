"""Drafts on disk, taken up again, on a budget of time, and what is refused."""

from __future__ import annotations

import pytest
import torch
from distill_cases import SETTINGS, Exact, apart, ddpm, solved

import deqdiff_fast as dq


def test_files_are_found_and_hold_the_same(tmp_path):
    schedule, shape = ddpm(100), (3, 8, 8)
    model = Exact(schedule, shape)
    pool = {"labels": torch.arange(3), "moved": torch.rand(3, 2)[:, :1]}
    draft = dq.distill(model, schedule, shape, pool, out=tmp_path / "new", **SETTINGS)
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"draft.safetensors", "spectrum.safetensors"}
    again = dq.Draft.load(tmp_path / "new" / "draft.safetensors")
    assert dq.SpectralSlope.load(tmp_path / "new" / "spectrum.safetensors").shape == shape
    x, t = torch.randn(3, *shape), torch.tensor([0, 50, 99])
    kwargs = {"labels": torch.tensor([0, 1, 2]), "moved": torch.rand(3, 1)}
    assert apart(again(x, t, **kwargs), draft(x, t, **kwargs)) < 5e-3  # half precision
    assert not any(p.requires_grad for p in again.parameters())


def test_it_is_taken_up_again(tmp_path, monkeypatch):
    schedule, shape = ddpm(100), (10,)
    model = Exact(schedule, shape)

    def steps_until(limit):
        from deqdiff_fast.distillation.fit import Fit

        counted, step = [0], Fit.step

        def counting(self, done):
            if counted[0] == limit:
                raise KeyboardInterrupt
            counted[0] += 1
            step(self, done)

        monkeypatch.setattr(Fit, "step", counting)
        return counted

    steps_until(40)
    with pytest.raises(KeyboardInterrupt):
        dq.distill(model, schedule, shape, out=tmp_path, **SETTINGS)
    assert {path.name for path in tmp_path.iterdir()} == {"distillation.pt", "distillation_rows.pt"}
    rows = model.rows
    monkeypatch.undo()
    with pytest.raises(ValueError, match="another seed; delete it"):
        dq.distill(model, schedule, shape, out=tmp_path, seed=5, **SETTINGS)
    counted = steps_until(10**9)
    first = model.rows
    draft = dq.distill(model, schedule, shape, out=tmp_path, **SETTINGS)
    assert 0 < counted[0] <= 20  # of 60
    assert model.rows - first < rows  # its own chains are not made again
    assert {path.name for path in tmp_path.iterdir()} == {"draft.safetensors", "spectrum.safetensors"}
    solved(model, schedule, draft, shape)
    (tmp_path / "distillation.pt").write_text("hello")
    with pytest.raises(ValueError, match=r"distillation\w*\.pt: expected an unfinished distillation, whole"):
        dq.distill(model, schedule, shape, out=tmp_path, **SETTINGS)


def test_the_report_is_of_solves(caplog):
    schedule, shape = ddpm(100), (10,)
    model = Exact(schedule, shape)
    with caplog.at_level("INFO", logger="deqdiff_fast"):
        draft = dq.distill(model, schedule, shape, steps=60)
    report = draft.report
    assert 0 < report.rounds <= 100
    assert report.error < 1e-2
    assert report.pays == (report.seconds < report.seconds_without)
    assert ("It pays" in str(report)) == report.pays
    assert str(report) in caplog.text
    assert min(report.cost, report.cost_of_row, report.seconds, report.seconds_serial) > 0


def test_the_time_is_kept(monkeypatch):
    """With a clock of the test's: the fit ends when the minutes are over, however many steps that were."""
    from deqdiff_fast.distillation import job

    now = [0.0]

    def clock():
        now[0] += 0.03
        return now[0]

    monkeypatch.setattr(job.time, "perf_counter", clock)
    schedule, shape = ddpm(50), (10,)
    dq.distill(Exact(schedule, shape), schedule, shape, minutes=0.5, measure=False)
    assert 25 < now[0] < 40


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"minutes": 0}, ValueError, "minutes: expected a number > 0"),
        ({"minutes": None}, ValueError, "minutes: expected a number > 0"),
        ({"steps": 0}, ValueError, "steps: expected"),
        ({"shape": (3.5,)}, (ValueError, TypeError), "shape"),
        ({"schedule": "ddim"}, TypeError, "schedule: expected"),
        ({"model": 3}, TypeError, "model"),
        ({"recording": [1]}, TypeError, "recording: expected a deqdiff_fast.Recording"),
        ({"recording": dq.Recording()}, ValueError, "recording: expected predictions of solves, got none"),
        ({"model_kwargs": {"a": torch.ones(2), "b": torch.ones(3)}}, ValueError, "model_kwargs: expected as many rows"),
        ({"model_kwargs": lambda count: [1]}, TypeError, "model_kwargs: expected a function that returns a dict"),
        ({"model": lambda x, t: x * float("nan")}, dq.NonFiniteError, "the model returned NaN or Inf"),
        ({"model": lambda x, t: x[:, :1]}, dq.ModelOutputError, "the model returned"),
        ({"surprise": 1}, TypeError, "surprise"),
    ],
)
def test_what_is_refused(change, error, message):
    schedule, shape = ddpm(50), (10,)
    given = {"model": Exact(schedule, shape), "schedule": schedule, "shape": shape, **SETTINGS}
    with pytest.raises(error, match=message):
        dq.distill(**(given | change))


def test_a_model_that_is_too_slow_is_told_so(monkeypatch):
    from deqdiff_fast.distillation import job

    now = [0.0]

    def clock():
        now[0] += 500.0
        return now[0]

    monkeypatch.setattr(job.time, "perf_counter", clock)
    schedule, shape = ddpm(50), (10,)
    with pytest.raises(ValueError, match=r"minutes: expected at least .* for a model whose call takes"):
        dq.distill(Exact(schedule, shape), schedule, shape, minutes=0.1)
