"""One round of the equilibrium inversion: the model on the active rows, the error to expect, and the inverse scan."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._types import Rows
from ..engine.system import SANE_RMS, System
from ..kernels import inverse_scan, newton_scan
from ..schedule import SpectralSlope
from . import guess
from .base import Task, check_finite

if TYPE_CHECKING:
    from .equilibrium import Equilibrium

STIFF = 0.5  # a step that contracts directions without data more than that is solved before the ones before it
FLAT_VARIANCE = 1e-3  # of such directions
ROUNDING = {torch.float32: (1e-6, 1e-6), torch.float64: (1e-10, 1e-12)}  # ridge and floor of the secants


class Sweep:
    """The states of one solve in their memory. The stiff rows next to the image, `tail` of them, have long rings."""

    def __init__(
        self, method: Equilibrium, task: Task, system: System, spectrum: SpectralSlope | None, width: int, tail: int
    ) -> None:
        self.method, self.steps, self.batch, self.width, self.tail = method, system.num_steps, system.batch, width, tail
        self.work = task.open(system, method.planned(tail), width)
        self.chain, self.rings = self.work.chain, self.work.memory
        guess.fill(self.work, spectrum, task.init)
        self.scale = guess.flow_scale(task.schedule, spectrum).to(system.device, system.dtype)
        self.weight = self.scale[-1] / self.scale[1:]  # what a miss of row i becomes on its way to the image
        self.linear = system.diagonal_slope
        self.size = self.chain.states[-1].square().sum(1).clamp_min(1e-30)
        self.careful = careful_slope(system) if method.slope is not None else self.chain.slope
        ridge, floor = ROUNDING[system.dtype]
        self.ridge = ridge if method.ridge is None else method.ridge
        self.floor = floor if method.floor is None else method.floor
        self.column = self.long_column = 0

    def run(self, rows: Rows, lo: list[int], hi: list[int], round: int) -> tuple[Tensor, Tensor, int]:
        """Evaluate rows lo[b] <= i < hi[b] and solve them for their states.

        Returns (T, B) what each row missed, as a relative error of the image, (B,) the relative error to expect if all
        rows have been evaluated, both on the CPU, and how many rows had to start again.
        """
        chain, rings, method = self.chain, self.rings, self.method
        self.work.evaluate(rows, round)
        expected = self._expect()
        self.column, self.long_column = round % (method.history + 1), round % (method.long_history + 1)
        settings = (method.damping, self.ridge, method.stale, self.floor, method.reach, chain.drift)
        stiff = [b > self.steps - self.tail for b in hi]
        tables = (chain.state_coef, chain.model_coef)
        if any(stiff):
            self._bounds(lo, hi, stiff)
            inverse_scan(
                chain.states, chain.predictions, *tables, self.careful, self.weight, chain.lo, chain.hi, chain.sq_diff,
                rings.long_z, rings.long_e, rings.long_filled, self.long_column, *settings, backend="reference",
            )  # fmt: skip
        if not all(stiff):
            self._bounds(lo, hi, [not s for s in stiff])
            inverse_scan(
                chain.states, chain.predictions, *tables, chain.slope, self.weight, chain.lo, chain.hi, chain.sq_diff,
                rings.z, rings.e, rings.filled, self.column, *settings,
                backend="auto" if chain.backend == "triton" else chain.backend,
            )  # fmt: skip
        missed = (chain.sq_diff / self.size).sqrt()
        repairs = self._repair(missed, round)
        return missed.cpu(), torch.where(expected.isfinite(), expected, float("inf")).cpu(), repairs

    def keep(self, b: int, start: int, stop: int) -> None:
        """States start..stop-1 of sample b become those that were evaluated last."""
        for i in range(start, stop):
            self.chain.states[i, b] = self._evaluated(i)[b]

    def enter(self, b: int, start: int, stop: int, warm: bool) -> None:
        """Rows start..stop-1 enter: unless they have states worth keeping, these follow the row after them."""
        chain = self.chain
        for i in range(start, stop):
            self._forget(i, torch.tensor([b]))
        if not warm and start < stop:
            ratio = self.scale[start:stop] / self.scale[stop]
            chain.states[start:stop, b] = ratio * chain.states[stop, b]

    def forget(self) -> None:
        self.rings.filled.zero_(), self.rings.long_filled.zero_()

    def _evaluated(self, i: int) -> Tensor:
        """(B, D): the states at which row i was evaluated last."""
        rings = self.rings
        stiff = i >= self.steps - self.tail
        states: Tensor = (
            rings.long_z[self.long_column, i % self.tail] if stiff else rings.z[self.column, i % self.width]
        )
        return states

    def _forget(self, i: int, who: Tensor) -> None:
        rings = self.rings
        if i >= self.steps - self.tail:
            rings.long_filled[i % self.tail, who] = 0
        else:
            rings.filled[i % self.width, who] = 0

    def _bounds(self, lo: list[int], hi: list[int], on: list[bool]) -> None:
        chain = self.chain
        chain.lo.copy_(torch.tensor([a if s else 0 for a, s in zip(lo, on)], dtype=torch.int32))
        chain.hi.copy_(torch.tensor([b if s else 0 for b, s in zip(hi, on)], dtype=torch.int32))

    def _expect(self) -> Tensor:
        """(B,) the error that the serial chain would make from the running noise, by the linear model around the
        states: the chain run forwards through it."""
        chain, rings = self.chain, self.rings
        rings.forward.copy_(chain.states)
        rings.known.zero_()
        every = torch.full_like(chain.lo, self.steps)
        scratch = torch.empty_like(chain.sq_diff)
        newton_scan(
            rings.forward, chain.predictions, chain.state_coef, chain.model_coef, self.linear,
            torch.zeros_like(every), every, scratch, torch.empty_like(scratch), rings.known_z, rings.known_e,
            rings.known, 0, drift=chain.drift, backend=chain.backend,
        )  # fmt: skip
        apart: Tensor = (rings.forward[-1] - chain.states[-1]).norm(dim=1) / chain.states[-1].norm(dim=1)
        return apart

    def _repair(self, missed: Tensor, round: int) -> int:
        """Rows whose prediction overflowed start again from the row after them. Returns how many did."""
        chain, count = self.chain, 0
        broken = ~missed.isfinite()
        for i in reversed(broken.any(1).nonzero().flatten().tolist()):
            check_finite(self.work, self._evaluated(i), i, missed[i], round)
            who = broken[i].nonzero().flatten()
            fresh = chain.states[i + 1] * (self.scale[i] / self.scale[i + 1])
            excess = fresh.square().mean(1, keepdim=True).sqrt() / SANE_RMS
            chain.states[i, who] = (fresh / excess.clamp_min(1))[who]
            self._forget(i, who)
            count += 1
        return count


def careful_slope(system: System) -> Tensor:
    """The slope whose step factor is the geometric mean of the spectrum's and of unit data's: where the network
    resolves more than the spectrum says, the spectrum's own factor overshoots."""
    a, b = system.state_coef, system.model_coef[:, :1]
    own = a[:, :1] + b * system.slope
    unit = a[:, :1] + b * system.schedule.slope()[:, None].to(a)
    mean = (own * unit).clamp_min(0).sqrt()
    slope = torch.where((own * unit > 0) & (b != 0), (mean * own.sign() - a[:, :1]) / b, system.slope)
    return torch.where(slope.isfinite(), slope, system.slope).to(system.dtype)


def stiff_rows(task: Task) -> int:
    """Rows counted from the image end up to the last one that contracts directions without data by more than STIFF."""
    schedule = task.schedule
    factor = schedule.state_coef[:, 0] + schedule.model_coef[:, 0] * schedule.slope(FLAT_VARIANCE)
    stiff = (factor.abs() < STIFF).nonzero().flatten().tolist()
    return schedule.num_steps - stiff[0] if stiff else 0
