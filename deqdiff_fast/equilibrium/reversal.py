"""Reversible: the exact gradient of the reversible iteration in constant memory (RevDEQ, arXiv 2509.12917).

    y+ = (1 - b) y + b f(z),    z+ = (1 - b) z + b f(y+)

can be run backwards from its last (y, z) alone:

    z = (z+ - b f(y+)) / (1 - b),    y = (y+ - b f(z)) / (1 - b).

The steps are recorded by autograd as they are made, so that the gradient goes wherever f's graph leads; but what f
saves for its backward pass is dropped, and made again from the states of the way back when autograd asks for it. Every
round of that way amplifies rounding by up to 1 / (1 - b)^2 where f is no expansion, so the states are float64, and
after each segment of rounds the way goes on from a stored pair, or from one that is made again from the last one stored
(see `Anchors`).
"""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import saved_tensors_hooks

from .._devices import Settings
from ..errors import ConvergenceWarning
from ..gradient.reversible import MISSED
from .anchors import Anchors
from .base import FlatFunction
from .loop import Solved, solve
from .reversible import ReversibleIteration, ReversibleSolver

GROWTH = 1e7  # of float64 rounding (1e-16) over a segment: far below what a float32 function can tell apart


def segment(relaxation: float) -> int:
    """The rounds over which rounding errors, reversed, grow by GROWTH."""
    return max(1, int(math.log(GROWTH) / (-2 * math.log(abs(1 - relaxation)))))


def solve_reversibly(
    f: FlatFunction, start: Tensor, solver: ReversibleSolver, tol: float, max_steps: int, what: str
) -> Solved:
    """Solve, with a graph that stores no more than its ends.

    Raises:
        ValueError: the device has no float64.
    """
    if start.device.type == "mps":
        raise ValueError("gradient: 'reversible' needs float64, which MPS does not have; use 'implicit'")
    iteration = RecordedIteration(solver, start)
    tape = iteration.tape = Tape(f, iteration, segment(solver.relaxation))
    found = solve(tape, iteration, tol, max_steps, what)
    tape.close(iteration, found.trace.steps - 1)
    return found


class Saved(NamedTuple):
    """What stands in for a tensor that was saved: the evaluation and the tensor's number in it."""

    evaluation: int
    number: int


class RecordedIteration(ReversibleIteration):
    """The iteration with steps that autograd records, storing nothing."""

    tape: Tape

    def __init__(self, settings: ReversibleSolver, z: Tensor) -> None:
        super().__init__(settings, z)
        self.round = 0

    def advance(self, evaluate: Any, active: Tensor | None) -> None:
        super().advance(evaluate, active)
        self.round += 1
        self.tape.anchors.offer(self.round, (self.y.detach(), self.z.detach()))

    def update(self, old: Tensor, value: Tensor, active: Tensor | None) -> Tensor:
        new: Tensor = _Update.apply(old, value, active, self.tape, self.round)  # type: ignore[no-untyped-call]
        return new


class Tape:
    """The evaluations of f, 2 K + 1 in K rounds: number 2 k is f(z_k), number 2 k + 1 is f(y_k+1).

    A way back stands at one evaluation, with `y` and `z` as they were then.
    """

    def __init__(self, f: FlatFunction, iteration: ReversibleIteration, segment: int) -> None:
        self.f, self.relaxation = f, iteration.relaxation
        self.anchors = Anchors((iteration.y.detach(), iteration.z.detach()), segment)
        self.needs_grad: list[bool] = []  # of the input of each evaluation
        self.rounds = torch.empty(0)  # (B, 1), made of each sample
        self.end = self.anchors.kept[0]
        self.at = -1
        self.captured: list[Tensor] = []
        self.value = self.y = self.z = iteration.z.detach()[:0]
        self.settings = Settings.now()  # torch runs backward passes without them

    @property
    def own_dtype(self) -> torch.dtype:
        return self.f.own_dtype

    def __call__(self, state: Tensor) -> Tensor:
        """Evaluate f on the way there."""
        evaluation, count = len(self.needs_grad), 0
        self.needs_grad.append(state.requires_grad)

        def pack(tensor: Tensor) -> Any:
            nonlocal count
            count += 1
            base = tensor if tensor._base is None else tensor._base
            if base.is_leaf and base.requires_grad:  # a parameter or a view of one: it is there anyway
                return tensor.detach(), tensor._version
            return Saved(evaluation, count - 1)

        with saved_tensors_hooks(pack, self.unpack):
            return self.f(state)

    def close(self, iteration: ReversibleIteration, rounds: Tensor) -> None:
        """The iteration is over. rounds: (B,), made of each sample."""
        self.end = iteration.y.detach(), iteration.z.detach()
        self.rounds = rounds.to(iteration.z.device)[:, None]

    def unpack(self, packed: Any) -> Tensor:
        """What was saved, made again where it was dropped."""
        if not isinstance(packed, Saved):
            tensor, version = packed
            if tensor._version != version:
                raise RuntimeError(
                    "gradient: a parameter of f was changed in place between equilibrium and its backward pass"
                )
            return tensor  # type: ignore[no-any-return]
        if self.at < packed.evaluation:  # the first pass, or another one over a retained graph
            self.at = len(self.needs_grad) - 1
            self.y, self.z = self.end
            self.evaluate()
        while self.at > packed.evaluation:
            self.step_back()
        if packed.number >= len(self.captured):
            raise RuntimeError("gradient: f saved fewer tensors than the first time; it must do the same in every call")
        return self.captured[packed.number]

    def evaluate(self) -> None:
        """Evaluate f where the way back stands, and keep what it saves."""
        self.captured = captured = []  # those of the last one are gone by now

        def pack(tensor: Tensor) -> None:
            captured.append(tensor.detach())

        def unpack(packed: Any) -> Tensor:
            raise AssertionError("this graph is never gone back through")

        state = (self.y if self.at % 2 else self.z).detach().requires_grad_(self.needs_grad[self.at])
        with torch.enable_grad(), self.settings.applied(), saved_tensors_hooks(pack, unpack):
            self.value = self.f(state).detach()

    def step_back(self) -> None:
        """To the evaluation before."""
        round, odd = divmod(self.at, 2)
        if odd:
            self.z = self._reverse(self.z, round)
        elif self.at < len(self.needs_grad) - 1:
            self.y = self._reverse(self.y, round)
            if round % self.anchors.segment == 0:
                self._anchor(round)
        self.at -= 1
        self.evaluate()
        if self.at == 0:
            self._check(self.z, self.anchors.kept[0][1])

    def _reverse(self, new: Tensor, round: int) -> Tensor:
        b = self.relaxation
        return torch.where(self.rounds > round, (new - b * self.value) / (1 - b), new)

    def _anchor(self, round: int) -> None:
        """Go on from the pair after `round` rounds, made again if it was not kept."""
        self.anchors.make_room(round)
        known, pair = self.anchors.nearest(round)
        b = self.relaxation
        y, z = pair
        with torch.no_grad(), self.settings.applied():
            for k in range(known, round):
                active = self.rounds > k
                y = torch.where(active, (1 - b) * y + b * self.f(z), y)
                z = torch.where(active, (1 - b) * z + b * self.f(y), z)
                self.anchors.offer(k + 1, (y, z))
        self._check(self.z, z)
        self.y, self.z = y, z

    def _check(self, reached: Tensor, known: Tensor) -> None:
        """Warn where the way back did not come by a state of the way there."""
        missed = float((reached - known).norm() / torch.maximum(known.norm(), self.end[1].norm()))
        if not missed <= MISSED:
            warnings.warn(
                f"reversible: run backwards, the iteration missed its own states by {missed:.1e} (relative), so that "
                "this gradient is wrong; f must return the same for the same z: no dropout, no state that it changes",
                ConvergenceWarning,
                stacklevel=2,
            )


class _Update(Function):
    """(1 - b) old + b value for the active samples, as the tape says which those were."""

    @staticmethod
    def forward(ctx: Any, old: Tensor, value: Tensor, active: Tensor | None, tape: Tape, round: int) -> Tensor:
        ctx.tape, ctx.round, ctx.dtype, b = tape, round, value.dtype, tape.relaxation
        new = (1 - b) * old + b * value
        return new if active is None else torch.where(active[:, None], new, old)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "gradient: expected to be differentiated once, 'reversible' is once_differentiable; for second "
                "derivatives use gradient='unrolled'"
            )
        weight = ctx.tape.relaxation * (ctx.tape.rounds > ctx.round).to(grad.dtype)
        return (1 - weight) * grad, (weight * grad).to(ctx.dtype), None, None, None
