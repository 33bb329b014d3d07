"""Run by the processes of test_pipelines.py: a pipeline of diffusers on several ranks makes what it makes on one."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from equality_checks import alike
from problems import apart
from rank_launch import run_checks
from torch import distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import pytest
from tiny_pipelines import arguments, build, call

import deqdiff_fast as dq
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


CHECKS = (guided_pipelines, stochastic_pipelines, other_seeds_are_found)

if __name__ == "__main__":
    torch.set_num_threads(1)
    run_checks({check.__name__: check for check in CHECKS})
