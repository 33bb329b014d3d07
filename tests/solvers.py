"""The solvers that every solver test runs on: one list, with the little that tests must know about each.

`from solvers import SOLVERS`, which tests/conftest.py makes possible, and `@pytest.mark.parametrize("case", SOLVERS,
ids=str)`. A solver that is added to the library goes into this list and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import deqdiff_fast as dq
from deqdiff_fast.kernels import ddim_update, ddim_update_bytes
from deqdiff_fast.loop.rows import move_rows
from deqdiff_fast.solver import Solver


@dataclass(frozen=True)
class RelaxedPicard(Solver):
    """X <- X + weight (F(X) - X), F the plain step: Picard iteration, damped (weight < 1) or over-relaxed (> 1)."""

    weight: float = 0.8
    period = 1  # the same device work in every round

    def plan_memory(self, request, size):
        for name in ("relaxed.old", "relaxed.plain"):
            request.add(name, (size.num_steps, size.batch, size.numel), size.dtype)

    def scratch_bytes(self, size):
        return ddim_update_bytes(size.num_steps, size.batch, size.numel, size.dtype, size.device, size.backend)

    def start(self, tensors):
        return tensors["relaxed.old"], tensors["relaxed.plain"]

    def step(self, chain, memory, round):
        old, plain, states = *memory, chain.states[1:]
        old.copy_(states)
        ddim_update(
            chain.states, chain.predictions, chain.state_coef, chain.model_coef, chain.lo, chain.hi,
            chain.sq_diff, chain.sq_norm, chain.drift, workspace=chain.scratch, backend=chain.backend,
        )  # fmt: skip
        plain.copy_(states)
        first = torch.arange(chain.num_steps, device=states.device)[:, None] == chain.lo  # (T, B)
        torch.where(first[..., None], plain, old.lerp_(plain, self.weight), out=states)

    def settle(self, chain, memory, round, old, new):  # final states are plain steps
        move_rows(chain.states[1:], memory[1], old, new, chain.backend)


@dataclass(frozen=True)
class Case:
    """A solver and what it cannot do."""

    name: str
    solver: str | Solver
    windows: bool = True
    """Takes a window narrower than the chain."""
    multistep: bool = True
    """Takes chains whose steps look further back than one state."""
    every_row: bool = True
    """A round is one model call on all active rows, after which the row next to the known state is final."""
    finishes: bool = True
    """Has no limit of rounds that leaves a part of the chain to be finished serially."""
    slow: bool = False
    """Takes many rounds on long chains: tests spare it those."""

    drafted: bool = False
    """Wants a draft."""

    def __str__(self) -> str:
        return self.name

    def sampler(self, model: Callable[..., Any], schedule: dq.Schedule, **options: Any) -> dq.DEQSampler:
        """A sampler with this solver, and with a draft that is a little off where it wants one."""

        def draft(x: Tensor, t: Tensor) -> Tensor:
            return model(x, t) + 0.05 * torch.sin(3 * x)

        own = {"draft": draft} if self.drafted else {}
        return dq.DEQSampler(model, schedule, solver=self.solver, **own | options)


SOLVERS = (
    Case("quasi-newton", "quasi-newton"),
    Case("quasi-newton-plain", dq.QuasiNewton(history=5, slope=None)),
    Case("quasi-newton-bf16", dq.QuasiNewton(history_dtype=torch.bfloat16), slow=True),
    Case("draft", "draft", drafted=True),

    Case("triangular", "triangular"),
    Case("triangular-bf16", dq.Anderson(history_dtype=torch.bfloat16), slow=True),
    Case("anderson", "anderson"),
    Case("anderson-trajectory", dq.Anderson(scope="trajectory")),
    Case("deq-ddim", "deq-ddim", finishes=False),
    Case("picard", "picard"),
    Case("paradigms", "paradigms"),
    Case("parataa", "parataa"),
    Case("parareal", "parareal", windows=False, multistep=False, every_row=False),
    Case("outside the library", RelaxedPicard()),
)
