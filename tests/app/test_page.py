"""The page of examples/app.py in a headless Chromium, where there are Gradio, Playwright and Chromium."""

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

import pytest
from app_cases import EXAMPLES, STEPS, rounds_of, watch

Image = pytest.importorskip("PIL.Image")


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


SHOWS = 90_000  # milliseconds at most until the page shows what it should


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
