"""The adjoint chain, solved in rounds with the settings of the sampler whose gradient it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._types import Model
from ..engine.options import Options
from ..engine.solve import Request, solve_parallel
from ..schedule import Schedule
from ..solver import resolve
from .base import Adjoint

ADJOINT_TOL = 1e-4


def adjoint_solve(options: Options) -> Adjoint:
    """`Problem.adjoint` for a sampler of these options."""

    def solve(model: Model, schedule: Schedule, start: Tensor, kwargs: dict[str, Any], tol: float | None) -> Tensor:
        solver = options.solver
        plain = solver.slope in ("auto", "scalar", None)  # a spectrum has the shape of an image
        # neither a draft nor a solver that makes its own rounds, which may want more of a chain than an adjoint one has
        plain = plain and not solver.needs_draft and not solver.makes_rounds and solver.max_rounds is None
        own = Options.check(
            model, schedule, (solver if plain else resolve("quasi-newton")).for_adjoint(), None,
            tol=tol or min(ADJOINT_TOL, options.tol or ADJOINT_TOL), max_rounds=None, window="auto",
            backend=options.backend, on_failure="serial", max_batch=options.max_batch, cuda_graph="auto",
            deterministic=True, spectrum=None, draft=None, certify="estimate", weight=None, group=None,
            shard_states=False,
        )  # fmt: skip
        request = Request(start, None, return_trajectory=True)
        with torch.no_grad():
            trajectory = solve_parallel(own.system(start, kwargs), own, request).trajectory
        assert trajectory is not None
        return trajectory

    return solve
