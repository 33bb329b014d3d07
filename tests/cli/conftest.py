"""Fixtures of the command line's tests."""

from __future__ import annotations

import pytest
from cli_cases import tiny_unet

from deqdiff_fast.cli import main


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    import diffusers

    folder = tmp_path_factory.mktemp("model") / "pipeline"
    scheduler = diffusers.DDIMScheduler(prediction_type="v_prediction", clip_sample=False)
    diffusers.DDIMPipeline(tiny_unet(), scheduler).save_pretrained(folder)
    return folder


@pytest.fixture
def sample(pipeline, tmp_path, monkeypatch):
    """Run `deqdiff-fast sample` on the tiny model in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*options: str) -> int:
        return main(["sample", "--model", str(pipeline), "--steps", "10", "--batch", "4", *options])

    return run
