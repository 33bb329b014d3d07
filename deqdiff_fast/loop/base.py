"""The contract between the loop and a solver: what a solver sees of a problem, and what it may be asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .task import Progress, Task

Bounds = list[int] | Tensor
"""One row for every sample: on the host, or (B,) int32 where only the device knows them."""


class MemoryRequest(Protocol):
    """Collects named tensors that will live in one slab."""

    def add(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Any: ...


class LeasedTensors(Protocol):
    """A slab cut into the named tensors of a request."""

    def __getitem__(self, name: str) -> Tensor: ...


class ProblemSize(NamedTuple):
    """What a solver must know to ask for memory."""

    num_steps: int
    window: int
    batch: int
    numel: int
    dtype: torch.dtype
    accumulator: torch.dtype
    lags: int = 1
    device: torch.device = torch.device("cpu")
    backend: str = "auto"


@dataclass
class Chain:
    """A triangular affine system in its working memory: X[i+1] = sum_l a[i,l] X[i-l] + b[i,l] E[i-l] + drift[i].

    States X: (T+1, B, D); predictions E: (T, B, D), row i evaluated at X[i]. Rows lo[b] <= i < hi[b] are being solved.
    """

    states: Tensor
    predictions: Tensor
    state_coef: Tensor  # (T, L) a
    model_coef: Tensor  # (T, L) b
    slope: Tensor  # (T, 1) or (T, D): the diagonal part of d prediction / d state
    step_variance: Tensor  # (T, 1) > 0: variance per element of the noise of each step, were the chain stochastic
    denoised_coef: Tensor  # (T, 2) [p, q]: p X + q E, the denoised estimate, changes little from step to step
    drift: Tensor | None  # (T, B, D) the frozen noise of every step times its coefficient
    lo: Tensor  # (B,) int32
    hi: Tensor  # (B,) int32
    sq_diff: Tensor  # (T, B) squared length of the last step of each row
    sq_norm: Tensor  # (T, B) squared size of its new state
    window: int
    backend: str
    scratch: Tensor | None = None  # (N,) uint8 for the ops, at least as much as `Solver.scratch_bytes` asks for
    window_scratch: Tensor | None = None  # (3, B, D) for what enters a sliding window

    @property
    def num_steps(self) -> int:
        return self.predictions.shape[0]

    @property
    def batch(self) -> int:
        return self.predictions.shape[1]


class Solver:
    """One way to solve a chain: the base class of every solver, the library's own and yours.

    A solver holds settings only, usually as the fields of a frozen dataclass; its memory is asked for in `plan_memory`
    and handed to the methods of a round. Write `step`; everything else has a default. See "Extending" in the
    documentation.
    """

    # Settings that the loop, the engine and the planner read.
    guess: str = "gaussian"
    """The starting trajectory: "gaussian", the chain of Gaussian data; "copy", the noise everywhere."""
    max_rounds: int | None = None
    """Rounds before giving up, where the sampler is given no limit. None: `round_limit`."""
    tol: float | None = None
    """Relative residual at which a solve ends, where the sampler is given no tolerance. None: the sampler's default."""
    safety: float = 0.1
    """Largest relative residual at which a solve may end, per unit of relative error allowed in the sample."""
    freeze: float = 0.003
    """What an early timestep may have left to go when it is taken for final, in the same unit."""
    strict: float | None = None
    """What part of `freeze` the rows of a stalled sample are held to. None: stalls are not looked for."""
    slope: Any = "scalar"
    """The diagonal slope of `Chain.slope`: "scalar", "spectral", "auto", a `SpectralSlope`, or None for zero."""
    by_step: bool = False
    """Whether rows are judged by the length of their last step alone, and not by what they have left to go."""
    makes_rounds: bool = False
    """Whether the solver makes its rounds itself, in `solve`, because they are not one call on all active rows."""
    nodes: bool = False
    """Whether the first rounds evaluate a few timesteps only, see `deqdiff_fast.nodes`; they may be all that it takes.
    A solver that wants them has `history`, `ridge` and `floor`, of their secants."""
    needs_draft: bool = False
    """Whether these rounds want a draft, a cheap stand-in for the model."""

    @property
    def name(self) -> str:
        """What results call it."""
        return type(self).__name__.lower()

    @property
    def period(self) -> int:
        """`step`, `settle` and `enter` are the same device work in rounds k and k + period, so that it may be recorded
        and replayed; they must not read bounds that are tensors then: `rows.move_rows` and `rows.clear_rows` take both
        kinds. 0: not recorded."""
        return 0

    def check(self, steps: int, lags: int, window: int | str) -> None:
        """Raises ValueError for chains that it cannot solve."""

    def for_adjoint(self) -> Solver:
        """The same solver for an adjoint chain, of whose data no spectrum is known."""
        return self

    def round_limit(self, steps: int) -> int:
        """Rounds after which every chain of that many steps is solved."""
        return steps

    def plan_memory(self, request: MemoryRequest, size: ProblemSize) -> None:
        """Ask for the solver's own memory: request.add(name, shape, dtype)."""

    def scratch_bytes(self, size: ProblemSize) -> int:
        """Bytes of `Chain.scratch` that its ops want as their `workspace`."""
        return 0

    def start(self, tensors: LeasedTensors) -> Any:
        """Begin a solve: forget everything. What it returns is the `memory` of the methods below."""
        return None

    def step(self, chain: Chain, memory: Any, round: int) -> None:
        """Predictions -> next states of rows lo <= i < hi, with sq_diff and sq_norm of the plain step against the old.

        The row lo must take the plain step: the serial chain's own, by which every round makes a state exact.
        """
        raise TypeError(f"{type(self).__name__} has neither step() nor solve()")

    def settle(self, chain: Chain, memory: Any, round: int, old: Bounds, new: Bounds) -> None:
        """Rows old[b] <= i < new[b] are final: states[i+1] must become the plain step from the last evaluation. Nothing
        to do where `step` has left it there."""

    def enter(self, chain: Chain, memory: Any, old: Bounds, new: Bounds) -> None:
        """Rows old[b] <= i < new[b] have entered the window or were rebuilt: drop what is remembered of them."""

    def solve(self, task: Task) -> Progress:
        """All rounds, of a solver that `makes_rounds`."""
        raise TypeError(f"{type(self).__name__} does not make its rounds itself")
