"""Fixtures of the command line's tests."""

from __future__ import annotations

import pytest
from cli_cases import save_pipeline

from deqdiff_fast.cli import main


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp("model") / "pipeline")


@pytest.fixture
def sample(pipeline, tmp_path, monkeypatch):
    """Run `deqdiff-fast sample` on the tiny model in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*options: str) -> int:
        return main(["sample", "--model", str(pipeline), "--steps", "10", "--batch", "4", *options])

    return run
