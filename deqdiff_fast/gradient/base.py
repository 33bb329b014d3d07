"""What a gradient mode is given, and what it must do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .._types import Generators, OnFailure
from ..engine.system import System
from ..schedule import Schedule
from ..solution import Callback, Solution

Adjoint = Callable[[Any, Schedule, Tensor, dict[str, Any], "float | None"], Tensor]
"""`adjoint(model, schedule, start, model_kwargs, tol)` -> the trajectory (T + 1, B, D) of that chain, solved in
parallel to that tolerance (None: the sampler's choice)."""


def refuse_inference_mode(what: str) -> None:
    """Raises RuntimeError under `torch.inference_mode`."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"{what}: expected torch.no_grad() or nothing around it, under inference_mode are no gradients"
        )


@dataclass(frozen=True)
class Relaxed:
    """The setting of reversible iterations: b in (0, 2), not 1."""

    relaxation: float = 0.8

    def __post_init__(self) -> None:
        b = self.relaxation
        if isinstance(b, bool) or not isinstance(b, (int, float)) or not 0 < b < 2 or b == 1:
            raise ValueError(f"relaxation: expected a number in (0, 2) other than 1, got {b!r}")

    @property
    def name(self) -> str:
        return f"reversible(relaxation={self.relaxation:g})"


@dataclass
class Problem:
    """One differentiable solve."""

    system: System
    noise: Tensor
    """(B, *shape), the initial state of the chain."""
    parameters: list[Tensor]
    """Those of the model that need a gradient."""
    solve: Callable[[], Solution]
    """The sampler's own solve; its solution holds the trajectory."""
    adjoint: Adjoint
    tolerance: float
    """The relative residual at which a solve ends."""
    max_rounds: int | None = None
    """What the sampler was given; None leaves it to the mode."""
    on_failure: OnFailure = "serial"
    generator: Generators = None
    init_trajectory: Tensor | None = None
    """(T + 1, B, *shape), a starting guess."""
    callback: Callback | None = None
    progress: bool = False


class Gradient(Protocol):
    """A way to differentiate the sample with respect to noise, model parameters and tensors in model_kwargs."""

    @property
    def name(self) -> str:
        """As it is shown in `Stats.solver` and in messages."""
        ...

    def attach(self, problem: Problem) -> Solution:
        """Solve, and attach this mode's gradient.

        Returns:
            The solution, with its trajectory; its `sample` has a `grad_fn`.

        Raises:
            NonFiniteError: the model returned NaN or Inf.
            NotConvergedError: the solve failed and `problem.on_failure` is "raise".
        """
        ...
