"""What the page of examples/app.py shows, without Gradio: pictures, curves, solves and their messages."""

from __future__ import annotations

import re
import threading

import pytest
import torch
from app_cases import SIZE, STEPS, save_pipeline

import deqdiff_fast as dq

Image = pytest.importorskip("PIL.Image")


@pytest.mark.parametrize("bad", [None, float("nan"), float("inf"), 0, -3, 2.5])
def test_fields_that_hold_no_number(app, bad):
    with pytest.raises(
        ValueError, match=r"^steps: expected a whole number from 1 on, got (nothing|nan|inf|0|-3|2\.5)$"
    ):
        app.number("steps", bad, 1)
    if bad != 2.5:
        with pytest.raises(ValueError, match=r"^tolerance: expected a number from"):
            app.number("tolerance", bad, 1e-12, whole=False)
    assert app.number("steps", 20.0, 1) == 20


def test_pictures_are_read_as_they_are_seen(app, file):
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (SIZE, SIZE, 3), dtype=torch.uint8)
    expected = pixels.permute(2, 0, 1)[None] / 127.5 - 1
    seen = Image.fromarray(pixels.numpy())
    assert torch.allclose(app.read_picture(file(seen), (3, SIZE, SIZE), False), expected)
    assert app.read_picture(file(seen), (1, SIZE, SIZE), False).shape == (1, 1, SIZE, SIZE)
    shown = app.to_picture(expected)
    assert shown.size == (256, 256)
    assert shown.resize((SIZE, SIZE), Image.Resampling.NEAREST).tobytes() == seen.tobytes()
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    seen.transpose(Image.Transpose.ROTATE_90).save(turned := file(seen, "turned.png"), exif=exif)
    assert torch.allclose(app.read_picture(turned, (3, SIZE, SIZE), False), expected)
    clear = Image.new("RGBA", (SIZE, SIZE), (0, 0, 0, 0))
    assert (app.read_picture(file(clear), (3, SIZE, SIZE), False) == 1).all()
    large = app.read_picture(file(Image.new("RGB", (20, 30), "red")), (3, SIZE, SIZE), True)
    assert torch.equal(large, torch.tensor([1.0, -1, -1]).view(1, 3, 1, 1).expand(1, 3, SIZE, SIZE))


def test_bad_uploads_are_refused_with_the_reason(app, file, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    with Image.open(file(Image.effect_noise((SIZE, SIZE), 9), "whole.png")) as whole:
        whole.save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:-40])
    for path, why in (
        (None, "upload a picture first"),
        (str(tmp_path / "text.png"), "text.png: not a picture that can be read"),
        (str(tmp_path / "cut.png"), "cut.png: not a picture that can be read"),
        (file(Image.new("RGB", (7, 5)), "small.png"), "small.png: 7 x 5 pixels, and the model makes 8 x 8"),
        (file(Image.new("I;16", (SIZE, SIZE)), "deep.png"), "deep.png.*more than 8 bits"),
    ):
        with pytest.raises(ValueError, match=why):
            app.read_picture(path, (3, SIZE, SIZE), False)


def test_curves_are_errors_against_the_reference(app):
    reference = torch.full((1, 1, 2, 2), 2.0)
    moments = [
        app.Moment(s, k, 0, estimate, reference * share)
        for k, (s, estimate, share) in enumerate([(0.5, float("inf"), 2.0), (1.0, 0.3, 1.5), (1.5, 0.0, 1.0)])
    ]
    assert app.curve(moments) == [(1.0, pytest.approx(0.3))]
    assert app.curve(moments, reference) == [(0.5, 1.0), (1.0, 0.5)], "no error has no logarithm"
    assert app.chart({"rounds": []}, 1e-2) is None
    axes = app.chart({"rounds": [(1, 0.5), (2, 0.1)], "serial chain": []}, 1e-2).axes[0]
    assert axes.get_yscale() == "log"
    assert [line.get_label() for line in axes.lines] == ["rounds", "serial chain", "tolerance"]
    assert axes.lines[0].get_xydata().tolist() == [[1, 0.5], [2, 0.1]]


def test_rounds_and_then_the_serial_chain_from_one_noise(app, folder, compare):
    views = list(compare())
    began = [view.status.count("\n") for view in views]
    assert began == sorted(began), "the serial chain after the rounds"
    rounds = [view for view in views if view.status.startswith("Rounds: round")]
    steps = [int(n) for view in views for n in re.findall(r"Serial chain: step (\d+),", view.status)]
    assert steps == list(range(1, STEPS + 1))

    loaded = app.load(folder)
    sampler = app.make_sampler(folder, STEPS, 1e-2, "quasi-newton")
    noise = torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3))
    noise = noise.to(next(loaded.model.parameters()).device)
    reference = sampler.serial(noise).sample
    assert views[-1].pictures[1].tobytes() == app.to_picture(reference).tobytes()
    said = re.fullmatch(
        r"Rounds: quasi-newton, (\d+) rounds, (\d+) evaluations.*, [\d.]+ s: converged\n"
        rf"Serial chain: {STEPS} steps, {STEPS} evaluations, [\d.]+ s: converged\n"
        r"Relative error of the rounds: (\S+)\. They took [\d.]+ of the serial chain's time\.",
        views[-1].status,
    )
    assert int(said[1]) == len(rounds)
    assert int(said[2]) > len(rounds)
    curves = {line.get_label(): line.get_ydata() for line in views[-1].plot.axes[0].lines}
    assert curves["rounds"][-1] == pytest.approx(float(said[3]), rel=0.06)
    assert curves["rounds"][-1] < 1e-2 < curves["rounds"][0]
    assert len(curves["serial chain"]) == STEPS - 1, "the last one is the reference"
    assert all(view.pictures[1] is None for view in rounds)


def test_long_chains_are_shown_in_part(app, compare):
    steps = [view for view in compare(steps=50) if "Serial chain: step" in view.status]
    assert 10 < len(steps) <= app.SERIAL_PICTURES
    assert "step 50, 50 timesteps final" in steps[-1].status


@pytest.mark.parametrize(
    ("when", "then"),
    [
        ("Rounds: round 1", r"Rounds: .* 1 rounds, .*: stopped\nSerial chain: not begun"),
        ("Serial chain: step 2", r"Rounds: .*: converged\nSerial chain: [23] steps, [23] evaluations, \S+ s: stopped"),
    ],
)
def test_stop_ends_both(compare, when, then):
    stop, last = threading.Event(), None
    for last in compare(stop=stop):
        if when in last.status:
            stop.set()
    assert re.fullmatch(then, last.status), last.status
    assert last.pictures[0] is not None


def test_inversion_of_a_picture(app, folder, file):
    torch.manual_seed(1)
    sampler = app.make_sampler(folder, 20, 1e-5, "auto")
    sample = sampler.serial(torch.randn(1, 3, SIZE, SIZE).to(next(sampler.model.parameters()).device)).sample.clamp(
        -1, 1
    )
    path = file(app.to_picture(sample).resize((SIZE, SIZE), Image.Resampling.NEAREST))
    views = list(app.invert(folder, 20, 1e-3, path, False, threading.Event()))
    assert "Inversion: round 1," in views[0].status
    found = re.search(
        r"converged\nRelative error of what the serial chain makes of that noise: (\S+)", views[-1].status
    )
    given = app.read_picture(path, (3, SIZE, SIZE), False).to(sample.device)
    expected = dq.DEQInverter(sampler.model, sampler.schedule, tol=1e-3).invert(given)
    assert float(found[1]) == pytest.approx(float(expected.error), rel=0.06)
    pictures = views[-1].pictures
    assert pictures[0].tobytes() == app.to_picture(given).tobytes()
    largest = max(abs(a - b) for a, b in zip(pictures[0].tobytes(), pictures[2].tobytes()))
    assert largest <= 2, "an error of 1e-3 is hardly seen"

    stop, views = threading.Event(), []
    for view in app.invert(folder, 20, 1e-3, path, False, stop):
        views.append(view)
        stop.set()
    assert re.search("1 rounds, .*stopped", views[-1].status)


def test_models_that_are_not_for_this_page(app, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        app.load(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="needs class_labels"):
        app.load(save_pipeline(tmp_path / "labelled", num_class_embeds=3))
    with pytest.raises(ValueError, match="needs a decoder"):
        app.load(save_pipeline(tmp_path / "latent", in_channels=4, out_channels=4))
