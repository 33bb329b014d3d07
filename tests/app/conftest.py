"""Fixtures of the tests of examples/app.py."""

from __future__ import annotations

import importlib.util
import threading

import pytest
from app_cases import EXAMPLES, STEPS, save_pipeline


@pytest.fixture(scope="module")
def app():
    """examples/app_solves.py, which gives no browser time to draw."""
    for name in ("diffusers", "PIL.Image", "matplotlib"):
        pytest.importorskip(name)
    spec = importlib.util.spec_from_file_location("app_solves", EXAMPLES / "app_solves.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.DRAWING = 0
    return module


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
