"""Run by the processes of test_pipelines.py: a pipeline, or a command, on several ranks makes what it makes on one."""

from __future__ import annotations

import io
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from equality_checks import alike
from problems import apart
from rank_launch import run_checks
from torch import distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "cli"))
import pytest
from cli_cases import save_pipeline
from PIL import Image
from tiny_pipelines import arguments, build, call

import deqdiff_fast as dq
from deqdiff_fast.cli import main
from deqdiff_fast.integrations.diffusers import parallelize


def made(name: str, rule: str | None = None, tol: float = 1e-6, **options: Any) -> tuple[Any, Any, Any]:
    """(what the parallel pipeline makes, what the plain one does, the parallel one)."""
    with tempfile.TemporaryDirectory() as folder:
        pipe = build(name, Path(folder), rule)
        plain = call(pipe, 2, **arguments(name)).images
        parallelize(pipe, tol=tol, **options)
        found = call(pipe, 2, **arguments(name)).images
    return found, plain, pipe


def guided_pipelines() -> None:
    found, plain, pipe = made("sd", solver="quasi-newton", group="world")
    alike(found, pipe.last_solution.stats.rounds)
    assert pipe.last_solution.stats.solver == "quasi-newton"
    assert apart(found, plain) < 1e-4


def stochastic_pipelines() -> None:
    found, plain, _ = made("ddpm", solver="picard", group="world")
    alike(found)
    assert apart(found, plain) < 1e-4


def other_seeds_are_found() -> None:
    with tempfile.TemporaryDirectory() as folder:
        pipe = parallelize(build("ddim", Path(folder)), group="world")
        with pytest.raises(dq.RankError, match="noise"):
            pipe(generator=torch.Generator().manual_seed(dist.get_rank()), **arguments("ddim"))


def restored_pictures() -> None:
    """`deqdiff-fast restore` as torchrun starts it, and alone."""
    folder, rank, patch = Path(sys.argv[1]).parent / "restored", dist.get_rank(), pytest.MonkeyPatch()
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    if rank == 0:
        save_pipeline(folder / "model")
        Image.fromarray(pixels).save(folder / "truth.png")
    dist.barrier()
    words = ["restore", "truth.png", "--simulate", "--operator", "inpaint", "--model", "./model", "--steps", "12"]
    words += ["--eta", "0", "--tol", "1e-4"]
    patch.chdir(folder)
    with patch.context() as started, redirect_stdout(io.StringIO()) as said:
        started.setenv("LOCAL_RANK", str(rank))
        started.setenv("TORCHELASTIC_RUN_ID", "x")
        assert main([*words, "--devices", "2", "--out", "two"]) == 0
    if rank == 0:
        assert said.getvalue().count("1 image, sigma 0") == said.getvalue().count("wrote measurement.png") == 1
    assert main([*words, "--out", f"one-{rank}"]) == 0
    dist.barrier()
    found, *expected = (
        np.asarray(Image.open(Path(name) / "restored.png")).astype(int) for name in ("two", "one-0", "one-1")
    )
    assert all(np.abs(found - one).max() <= 1 for one in expected)
    assert not np.array_equal(found.astype(np.uint8), pixels)
    patch.undo()


CHECKS = (guided_pipelines, stochastic_pipelines, other_seeds_are_found, restored_pictures)

if __name__ == "__main__":
    torch.set_num_threads(1)
    run_checks({check.__name__: check for check in CHECKS})
