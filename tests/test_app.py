"""examples/app.py: its solves without Gradio, and the page in a headless Chromium where there are both."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import deqdiff_fast as dq

diffusers = pytest.importorskip("diffusers")
Image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SIZE, STEPS = 8, 6
SHOWS = 90_000  # milliseconds at most until the page shows what it should


@pytest.fixture(scope="module")
def app():
    """examples/app_solves.py, which gives no browser time to draw."""
    spec = importlib.util.spec_from_file_location("app_solves", EXAMPLES / "app_solves.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.DRAWING = 0
    return module


def save_pipeline(folder: Path, **config) -> str:
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=SIZE, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, add_attention=False, **config,
    )  # fmt: skip
    scheduler = diffusers.DDIMScheduler(prediction_type="v_prediction", clip_sample=False)
    diffusers.DDIMPipeline(unet, scheduler).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp("model") / "pipeline")


@pytest.fixture
def compare(app, folder):
    def compare(*, seed=3, steps=STEPS, tol=1e-2, solver="quasi-newton", stop=None):
        return app.compare(folder, seed, steps, tol, solver, stop or threading.Event())

    return compare


@pytest.fixture
def file(tmp_path):
    def file(picture, name="cat.png") -> str:
        picture.save(tmp_path / name)
        return str(tmp_path / name)

    return file


def round_info(round, final=0, residual=1.0, steps=9):
    return SimpleNamespace(
        round=round, num_steps=steps, front=torch.tensor([final]), residual=torch.tensor([residual]),
        sample=lambda: torch.full((1, 1, 2, 2), float(round)),
    )  # fmt: skip


def rounds_of(count, callback, before=lambda: None):
    """A solve of so many rounds, stopped by its callback; returns how many it made."""
    for round in range(1, count + 1):
        before()
        if callback(round_info(round, final=9 if round == count else 0)):
            return round
    return count


def watch(app, solve, stop=None, every=1):
    return app.Watched(solve, stop or threading.Event(), lambda info: info.sample(), every)


def test_a_watched_solve_is_seen_round_by_round(app):
    watched = watch(app, partial(rounds_of, 5))
    assert [(m.round, m.final, float(m.image.mean())) for m in watched] == [
        (1, 0, 1.0), (2, 0, 2.0), (3, 0, 3.0), (4, 0, 4.0), (5, 9, 5.0),
    ]  # fmt: skip
    assert watched.result == 5
    some = watch(app, partial(rounds_of, 7), every=3)
    assert [m.round for m in some] == [3, 6, 7], "every third, and the last"
    assert some.result == 7


def test_the_clock_stands_still_while_a_round_is_looked_at(app, monkeypatch):
    now = [0.0]

    def pass_time(seconds):
        now[0] += seconds

    monkeypatch.setattr(app.time, "perf_counter", lambda: now[0])
    watched = watch(app, partial(rounds_of, 3, before=lambda: pass_time(2)))
    seconds = []
    for moment in watched:
        seconds.append(moment.seconds)
        pass_time(100)
    assert seconds == [2, 4, 6]
    assert watched.seconds == 6


def test_a_solve_that_fails_fails_where_it_is_watched(app):
    def solve(callback):
        callback(round_info(1))
        raise ValueError("no")

    watched = watch(app, solve)
    with pytest.raises(ValueError, match=r"^no$"):
        list(watched)
    assert len(watched.moments) == 1


def test_a_solve_that_nobody_watches_any_more_ends(app):
    stop, threads = threading.Event(), threading.active_count()
    watched = watch(app, partial(rounds_of, 1000), stop)
    moments = iter(watched)
    next(moments), next(moments)
    moments.close()
    assert stop.is_set()
    assert threading.active_count() == threads
    assert watched.result == 2


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


@pytest.fixture(scope="module")
def address(folder, tmp_path_factory):
    """That of the page, served by the example as a script."""
    pytest.importorskip("gradio")
    pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("page") / "log"
    command = [sys.executable, str(EXAMPLES / "app.py"), "--model", folder, "--port", str(port)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "GRADIO_ANALYTICS_ENABLED": "False", "NO_PROXY": "127.0.0.1"}
    with (
        log.open("w") as output,
        subprocess.Popen(command, cwd=log.parent, env=environment, stdout=output, stderr=subprocess.STDOUT) as served,
    ):
        try:
            end = time.monotonic() + SHOWS / 1000
            while "Running on local URL" not in log.read_text():
                assert served.poll() is None, log.read_text()
                assert time.monotonic() < end, log.read_text()
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}"
        finally:
            served.terminate()
    assert "Traceback" not in log.read_text(), log.read_text()


@pytest.fixture(scope="module")
def browser(address):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, address):
    """Opens the page, in a browser that reaches nothing else."""
    pages = []

    def visit():
        page = browser.new_page()
        pages.append(page)
        page.set_default_timeout(SHOWS)
        page.route("**/*", lambda to: to.continue_() if to.request.url.startswith(address) else to.abort())
        page.goto(address)
        return page

    yield visit
    for page in pages:
        page.close()


def says(page, label, pattern):
    """Waits until a field of the page says it."""
    from playwright.sync_api import expect

    expect(page.get_by_label(label, exact=True)).to_have_value(re.compile(pattern, re.S), timeout=SHOWS)
    return page.get_by_label(label, exact=True).input_value()


def fill(page, **fields):
    for label, value in fields.items():
        page.get_by_label(label).first.fill(str(value))


def press(page, button):
    page.get_by_role("button", name=button, exact=True).click()


def test_the_page_samples(visit, folder):
    page = visit()
    page.wait_for_function("() => document.title == 'deqdiff_fast'")
    assert page.get_by_label("model").first.input_value() == folder
    fill(page, steps=STEPS, seed=3)
    press(page, "Sample")
    text = says(page, "how it goes", "Relative error")
    assert float(re.search(r"rounds: (\S+)\. They", text)[1]) < 1e-2
    page.wait_for_function(
        "() => [...document.images].filter(i => i.naturalWidth == 256 && i.naturalHeight == 256).length == 2"
    )
    page.wait_for_function("() => [...document.images].some(i => i.naturalWidth > 400)", timeout=SHOWS)  # the curves


def test_the_page_stops_and_says_what_is_wrong_with_its_fields(visit, folder):
    page = visit()
    fill(page, steps=500, tolerance=1e-9)
    press(page, "Sample")
    says(page, "how it goes", "Rounds: round")
    press(page, "Stop")
    says(page, "how it goes", "stopped\nSerial chain: not begun")
    for field, value, complaint in (
        ("steps", "", "steps: expected a whole number from 1 on, got"),
        ("model", folder + "x", "FileNotFoundError: .* there is no such folder"),
    ):
        fill(page, steps=STEPS, model=folder)
        fill(page, **{field: value})
        press(page, "Sample")
        says(page, "how it goes", complaint)


def test_a_solve_ends_with_its_visitor(app, browser, monkeypatch):
    """One that would never end."""
    monkeypatch.syspath_prepend(EXAMPLES)
    page_of = importlib.import_module("app")
    ended = threading.Event()

    def compare(name, seed, steps, tol, solver, stop):
        def solve(callback):
            rounds_of(10**9, callback, before=lambda: time.sleep(0.02))
            ended.set()

        for moment in watch(app, solve, stop):
            yield page_of.View(f"round {moment}", (None, None))

    monkeypatch.setattr(page_of, "compare", compare)
    served = page_of.build("bundled")
    try:
        _, address, _ = served.launch(prevent_thread_lock=True, ssr_mode=False, quiet=True)
        page = browser.new_page()
        page.goto(address)
        press(page, "Sample")
        says(page, "how it goes", "round")
        page.close()
        assert ended.wait(SHOWS / 1000)
    finally:
        served.close()


def test_the_page_inverts_and_says_what_is_wrong_with_an_upload(visit, file, tmp_path):
    page, label = visit(), "how the inversion goes"
    fill(page, steps=20, tolerance=1e-3)
    press(page, "Invert")
    says(page, label, "upload a picture first")
    (tmp_path / "text.png").write_text("no picture")
    page.locator("input[type=file]").first.set_input_files(str(tmp_path / "text.png"))
    page.get_by_text("text.png", exact=False).first.wait_for()
    press(page, "Invert")
    says(page, label, "text.png: not a picture that can be read")
    page.get_by_label("Remove this file").or_(page.get_by_label("Clear")).first.click()
    page.locator("input[type=file]").first.set_input_files(file(Image.new("RGB", (7, 5), "teal"), "small.png"))
    page.get_by_text("small", exact=False).first.wait_for()
    press(page, "Invert")
    says(page, label, "small.png: 7 x 5 pixels, and the model makes 8 x 8")
    page.get_by_label("scale it").check()
    press(page, "Invert")
    text = says(page, label, "Relative error of what the serial chain makes")
    assert float(re.search(r"noise: (\S+)", text)[1]) < 1e-1
