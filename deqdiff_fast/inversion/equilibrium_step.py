"""One round of the equilibrium inversion: the model on the active rows, the error to expect, and the inverse scan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .._types import Rows
from ..engine.system import SANE_RMS, System
from ..kernels import inverse_scan, inverse_scan_bytes, newton_scan, newton_scan_bytes
from ..kernels.stopping import TINY_OF
from ..loop.base import LeasedTensors, MemoryRequest, ProblemSize, Solver
from ..schedule import Schedule, SpectralSlope
from .base import InversionProblem, check_finite
from .initial_guess import fill_states, flow_scale

if TYPE_CHECKING:
    from .equilibrium import Equilibrium

STIFF = 0.5  # a step that contracts directions without data more than that is solved before the ones before it
FLAT_VARIANCE = 1e-3  # of such directions
ROUNDING = {torch.float32: (1e-6, 1e-6), torch.float64: (1e-10, 1e-12)}  # ridge and floor of the secants


class SecantHistory(NamedTuple):
    """The last H evaluations of some rows, row i in slot i % W; the next column to fill is the H + 1st."""

    states: Tensor  # (H + 1, W, B, D), at which the model was called
    predictions: Tensor  # (H + 1, W, B, D)
    filled: Tensor  # (W, B) int32, columns that count


class SolverState(NamedTuple):
    """Histories of the stiff rows and of all others, and the chain run forwards through its linear model."""

    stiff: SecantHistory
    other: SecantHistory
    forward: Tensor  # (T + 1, B, D)
    no_history: SecantHistory  # (1, T, B, D), always empty: with it the forward scan is linear around the states


@dataclass(frozen=True)
class StateLayout(Solver):
    """Asks for that memory: history and long_history as in `Equilibrium`, the latter of `stiff` rows."""

    history: int
    long_history: int
    stiff: int

    def plan_memory(self, request: MemoryRequest, size: ProblemSize) -> None:
        """Ask for the memory."""
        row = (size.batch, size.numel)
        for prefix, columns, slots in (
            ("other", self.history + 1, size.window),
            ("stiff", self.long_history + 1, max(self.stiff, 1)),
            ("no_history", 1, size.num_steps),
        ):
            request.add(f"inverse.{prefix}.states", (columns, slots, *row), size.dtype)
            request.add(f"inverse.{prefix}.predictions", (columns, slots, *row), size.dtype)
            request.add(f"inverse.{prefix}.filled", (slots, size.batch), torch.int32)
        request.add("inverse.forward", (size.num_steps + 1, *row), size.dtype)

    def scratch_bytes(self, size: ProblemSize) -> int:
        """Of the scans backwards, and of the linear one forwards."""
        kind = (size.dtype, size.device, size.backend)
        needed: int = max(
            inverse_scan_bytes(size.window, size.batch, size.numel, self.history, *kind),
            inverse_scan_bytes(max(self.stiff, 1), size.batch, size.numel, self.long_history, *kind),
            newton_scan_bytes(size.num_steps, size.batch, size.numel, 0, size.lags, size.dtype, *kind),
        )
        return needed

    def start(self, tensors: LeasedTensors) -> SolverState:
        """The memory, its contents undefined."""
        stiff, other, no_history = (
            SecantHistory(*(tensors[f"inverse.{prefix}.{name}"] for name in SecantHistory._fields))
            for prefix in ("stiff", "other", "no_history")
        )
        return SolverState(stiff, other, tensors["inverse.forward"], no_history)


class EquilibriumStep:
    """The states of one solve in their memory.

    Args:
        width: most active rows at a time.
        tail: rows next to the image that are stiff, and have long histories.
    """

    def __init__(
        self, method: Equilibrium, problem: InversionProblem, system: System, spectrum: SpectralSlope | None,
        width: int, tail: int,
    ) -> None:  # fmt: skip
        self.method, self.steps, self.width, self.tail = method, system.num_steps, width, tail
        layout = StateLayout(method.history, method.long_history, tail)
        self.work = problem.open_workspace(system, layout, width)
        self.chain, self.state = self.work.chain, self.work.memory
        assert isinstance(self.state, SolverState)
        fill_states(self.work, spectrum, problem.init_trajectory)
        self.scale = flow_scale(problem.schedule, spectrum).to(system.device, system.dtype)
        self.weight = self.scale[-1] / self.scale[1:]  # what a miss of row i becomes on its way to the image
        self.diagonal_slope = system.diagonal_slope
        self.sq_size = self.chain.states[-1].square().sum(1).clamp_min(TINY_OF[system.dtype])
        self.damped_slope = damped_slope(system) if method.slope is not None else self.chain.slope
        ridge, floor = ROUNDING[system.dtype]
        self.ridge = ridge if method.ridge is None else method.ridge
        self.floor = floor if method.floor is None else method.floor
        self.column = self.stiff_column = 0

    def run(self, rows: Rows, lo: list[int], hi: list[int], round: int) -> tuple[Tensor, Tensor, int]:
        """Evaluate rows lo[b] <= i < hi[b] and solve them for their states.

        Returns:
            (T, B) what each row missed, as a relative error of the image; (B,) the relative error to expect if all
            rows have been evaluated; both on the CPU; and how many rows had to start again.
        """
        chain, method, state = self.chain, self.method, self.state
        self.work.evaluate(rows, round)
        expected = self._predicted_error()
        self.column, self.stiff_column = round % (method.history + 1), round % (method.long_history + 1)
        stiff = [b > self.steps - self.tail for b in hi]
        if any(stiff):
            self._set_bounds(lo, hi, stiff)
            self._inverse_scan(self.damped_slope, state.stiff, self.stiff_column)
        if not all(stiff):
            self._set_bounds(lo, hi, [not s for s in stiff])
            self._inverse_scan(chain.slope, state.other, self.column)
        missed = (chain.sq_diff / self.sq_size).sqrt()
        seen = torch.cat([missed, expected[None].to(missed)]).cpu()  # a device is waited for once
        missed, expected = seen[:-1], seen[-1]
        repairs = self._repair(missed, round)
        return missed, torch.where(expected.isfinite(), expected, float("inf")), repairs

    def _inverse_scan(self, slope: Tensor, history: SecantHistory, column: int) -> None:
        chain, method = self.chain, self.method
        inverse_scan(
            chain.states, chain.predictions, chain.state_coef, chain.model_coef, slope, self.weight, chain.lo, chain.hi,
            chain.sq_diff, *history, column, method.damping, self.ridge, method.stale, self.floor, method.reach,
            chain.drift, workspace=chain.scratch, backend=chain.backend,
        )  # fmt: skip

    def restore_evaluated(self, b: int, start: int, stop: int) -> None:
        """States start..stop-1 of sample b become those that were evaluated last."""
        for i in range(start, stop):
            self.chain.states[i, b] = self._evaluated(i)[b]

    def enter(self, b: int, start: int, stop: int, warm: bool) -> None:
        """Rows start..stop-1 enter: unless they have states worth using (warm), these follow the row after them."""
        chain = self.chain
        for i in range(start, stop):
            self._forget_row(i, torch.tensor([b]))
        if not warm and start < stop:
            ratio = self.scale[start:stop] / self.scale[stop]
            chain.states[start:stop, b] = ratio * chain.states[stop, b]

    def clear_history(self) -> None:
        """Forget all evaluations."""
        self.state.other.filled.zero_(), self.state.stiff.filled.zero_()

    def _place(self, i: int) -> tuple[SecantHistory, int, int]:
        """The history of row i, its current column, and the row's slot."""
        if i >= self.steps - self.tail:
            return self.state.stiff, self.stiff_column, i % self.tail
        return self.state.other, self.column, i % self.width

    def _evaluated(self, i: int) -> Tensor:
        """(B, D): the states at which row i was evaluated last."""
        history, column, slot = self._place(i)
        return history.states[column, slot]

    def _forget_row(self, i: int, samples: Tensor) -> None:
        history, _, slot = self._place(i)
        history.filled[slot, samples] = 0

    def _set_bounds(self, lo: list[int], hi: list[int], active: list[bool]) -> None:
        """The rows of the next scan: lo[b] <= i < hi[b] of the active samples."""
        bounds = [[k if on else 0 for k, on in zip(ends, active)] for ends in (lo, hi)]
        first, last = torch.tensor(bounds, dtype=torch.int32).to(self.chain.lo.device)
        self.chain.lo.copy_(first), self.chain.hi.copy_(last)

    def _predicted_error(self) -> Tensor:
        """(B,) the error that the serial chain would make from the running noise, by the linear model around the
        states: the chain run forwards through it."""
        chain, forward, no_history = self.chain, self.state.forward, self.state.no_history
        forward.copy_(chain.states)
        no_history.filled.zero_()
        every = torch.full_like(chain.lo, self.steps)
        scratch = torch.empty_like(chain.sq_diff)
        newton_scan(
            forward, chain.predictions, chain.state_coef, chain.model_coef, self.diagonal_slope,
            torch.zeros_like(every), every, scratch, torch.empty_like(scratch), *no_history, 0,
            drift=chain.drift, workspace=chain.scratch, backend=chain.backend,
        )  # fmt: skip
        error: Tensor = (forward[-1] - chain.states[-1]).norm(dim=1) / chain.states[-1].norm(dim=1)
        return error

    def _repair(self, missed: Tensor, round: int) -> int:
        """Rows whose prediction overflowed start again from the row after them. Returns how many did.

        Args:
            missed: (T, B), on the CPU.
        """
        chain, count = self.chain, 0
        broken = ~missed.isfinite()
        for i in reversed(broken.any(1).nonzero().flatten().tolist()):
            check_finite(self.work, self._evaluated(i), i, missed[i].to(chain.states.device), round)
            samples = broken[i].nonzero().flatten()
            fresh = chain.states[i + 1] * (self.scale[i] / self.scale[i + 1])
            excess = fresh.square().mean(1, keepdim=True).sqrt() / SANE_RMS
            chain.states[i, samples] = (fresh / excess.clamp_min(1))[samples]
            self._forget_row(i, samples)
            count += 1
        return count


def damped_slope(system: System) -> Tensor:
    """The slope whose step factor is the geometric mean of the spectrum's and of unit data's: where the network
    resolves more than the spectrum says, the spectrum's own factor overshoots."""
    a, b = system.state_coef, system.model_coef[:, :1]
    own = a[:, :1] + b * system.slope
    unit = a[:, :1] + b * system.schedule.slope()[:, None].to(a)
    mean = (own * unit).clamp_min(0).sqrt()
    slope = torch.where((own * unit > 0) & (b != 0), (mean * own.sign() - a[:, :1]) / b, system.slope)
    return torch.where(slope.isfinite(), slope, system.slope).to(system.dtype)


def stiff_rows(schedule: Schedule) -> int:
    """Rows counted from the image end up to the last one that contracts directions without data by more than STIFF."""
    factor = schedule.state_coef[:, 0] + schedule.model_coef[:, 0] * schedule.slope(FLAT_VARIANCE)
    stiff = (factor.abs() < STIFF).nonzero().flatten().tolist()
    return schedule.num_steps - stiff[0] if stiff else 0
