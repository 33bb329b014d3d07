"""The memory of one solve: planned as one slab before the first round, nothing allocated after it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._types import Generators, Rows
from ..loop.base import Bounds, Chain, ProblemSize, Solver
from ..loop.rows import repeat_rows
from ..loop.task import Replay, run_eager
from ..memory import Lease, MemoryPlan, SolverMemory
from ..schedule.noise import discard_draws, fill_drift
from .initial_guess import extrapolate, gaussian_guess
from .sample_guess import guess_towards
from .system import System

SCRATCH = ("rows", "inputs", "spare", "scratch", "window_scratch")  # of one piece of work: nothing is left there


@dataclass
class Workspace:
    """A leased slab cut into a chain, the model's inputs and the solver's own memory."""

    lease: Lease
    chain: Chain
    memory: Any
    system: System
    solver: Solver
    warm: bool = False

    @classmethod
    def open(cls, system: System, solver: Solver, window: int, memory: SolverMemory, backend: str) -> Workspace:
        lease = memory.lease(cls.layout(system, solver, window, backend), system.device)
        chain = Chain(
            states=lease["states"],
            predictions=lease["predictions"][:-1].view(system.num_steps, system.batch, system.numel),
            state_coef=system.state_coef, model_coef=system.model_coef, slope=system.slope,
            step_variance=system.step_variance, denoised_coef=system.denoised_coef,
            drift=lease["drift"] if system.schedule.stochastic else None, lo=system.bounds(0), hi=system.bounds(0),
            sq_diff=lease["sq_diff"], sq_norm=lease["sq_norm"], window=window, backend=backend,
            scratch=lease.get("scratch"), window_scratch=lease.get("window_scratch"),
        )  # fmt: skip
        return cls(lease, chain, solver.start(lease), system, solver)

    def restart(self) -> None:
        """Forget a solve; the memory stays where it is."""
        self.memory = self.solver.start(self.lease)

    def tensors(self, scratch: bool = True) -> list[Tensor]:
        """Its memory, with that which holds nothing from one piece of work to the next, or without."""
        names = [name for name in self.lease.names() if scratch or name not in SCRATCH]
        return [*(self.lease[name] for name in names), self.chain.lo, self.chain.hi]

    @staticmethod
    def layout(system: System, solver: Solver, window: int, backend: str) -> MemoryPlan:
        """The tensors of a solve; `.layout()[1]` of it is their size in bytes."""
        steps, batch, numel = system.num_steps, system.batch, system.numel
        plan = MemoryPlan()
        plan.add("states", (steps + 1, batch, numel), system.dtype)
        plan.add("predictions", (steps * batch + 1, numel), system.dtype)  # the last row takes what padding yields
        if system.schedule.stochastic:
            plan.add("drift", (steps, batch, numel), system.dtype)
        plan.add("sq_diff", (steps, batch), system.accumulator)
        plan.add("sq_norm", (steps, batch), system.accumulator)
        system.plan(plan, min(window * batch, system.max_batch or window * batch))
        if window < steps:
            plan.add("window_scratch", (3, batch, numel), system.dtype)
        size = ProblemSize(
            steps, window, batch, numel, system.dtype, system.accumulator, system.state_coef.shape[1], system.device,
            backend,
        )  # fmt: skip
        solver.plan_memory(plan, size)
        # one for all ops: they run one after the other, on one stream
        scratch = max(system.scratch_bytes(backend), solver.scratch_bytes(size))
        if scratch:
            plan.add("scratch", (scratch,), torch.uint8)
        return plan

    def begin(self, noise: Tensor, generator: Generators) -> None:
        """State 0 and the frozen noise."""
        rows = noise.detach().reshape(noise.shape[0], -1).to(self.system.dtype)
        self.chain.states[0].copy_(self.system.to_basis(rows))
        self.chain.sq_diff.zero_(), self.chain.sq_norm.zero_()
        if self.chain.drift is not None:
            fill_drift(self.chain.drift, self.system.schedule, tuple(noise.shape), generator, noise.dtype)
            if self.system.basis is not None:
                self.system.basis.forward(self.chain.drift.flatten(0, 1))
        else:
            discard_draws(self.system.schedule, tuple(noise.shape), generator, noise.dtype, noise.device)

    def guess(self, init: Tensor | None, replay: Replay = run_eager) -> None:
        """States 1..T: a given trajectory, copies of the noise, or the chain of Gaussian data."""
        chain = self.chain
        self.warm = init is not None
        if init is not None:
            rows = init[1:].reshape(chain.num_steps * chain.batch, -1).to(self.system.device, self.system.dtype)
            chain.states[1:].copy_(self.system.to_basis(rows).view_as(chain.states[1:]))
        elif self.solver.guess == "copy":
            chain.states[1:].copy_(chain.states[:1].expand_as(chain.states[1:]))
        else:
            replay(("guess", 0), lambda: gaussian_guess(chain, self.system.diagonal_slope))

    def guess_towards(self, init: Tensor) -> None:
        """States 1..T: a chain that ends at a guess of the sample, (B, *shape)."""
        self.warm = True
        guess_towards(self.chain, self.system, init)

    def resume(self, other: Workspace, front: int) -> None:
        """Take over a chain of the same system whose first `front` steps are made; later states are extrapolated."""
        chain, done = self.chain, other.chain
        chain.states[: front + 1].copy_(done.states[: front + 1])
        chain.predictions[:front].copy_(done.predictions[:front])
        chain.sq_diff.zero_(), chain.sq_norm.zero_()
        if chain.drift is not None and done.drift is not None:
            chain.drift.copy_(done.drift)
        self.rebuild([front] * chain.batch, [chain.num_steps] * chain.batch, True)

    def evaluate(self, rows: Rows, round: int) -> None:
        """Predictions of those rows from their states."""
        self.system.evaluate(self.chain.states, self.lease["predictions"], rows, self.lease, round)

    def rebuild(self, old: Bounds, new: Bounds, broken: bool) -> None:
        """States of rows old[b] <= i < new[b], which enter the window or were lost to an overflow."""
        if self.warm and not broken:
            return  # a given trajectory is the better guess
        if self.solver.guess == "copy" and not broken:
            repeat_rows(self.chain, old, new)
        else:
            extrapolate(self.chain, self.system.diagonal_slope, old, new)

    def trajectory(self) -> Tensor:
        """(T + 1, B, *shape), a copy in the model's dtype."""
        states = self.system.from_basis(self.chain.states.flatten(0, 1))
        return states.view(-1, self.system.batch, *self.system.shape).to(self.system.model_dtype)
