"""What a solver sees of a problem, and what the loop asks of a solver. Neither knows diffusion."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .._types import DraftRows
from ..kernels import copy_rows

Bounds = list[int] | Tensor
"""One row for every sample: on the host, or (B,) int32 where only the device knows them."""


class Plan(Protocol):
    """A memory plan: named tensors that will live in one slab."""

    def add(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Any: ...


class Lease(Protocol):
    """A slab cut into the named tensors of a plan."""

    def __getitem__(self, name: str) -> Tensor: ...


class Size(NamedTuple):
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
    noisy: bool = False


@dataclass
class Chain:
    """A triangular affine system in its working memory: X[i+1] = sum_l a[i,l] X[i-l] + b[i,l] E[i-l] + drift[i].

    states X: (T+1, B, D); predictions E: (T, B, D), row i evaluated at X[i]. Rows lo[b] <= i < hi[b] are being solved.
    """

    states: Tensor
    predictions: Tensor
    state_coef: Tensor
    model_coef: Tensor
    slope: Tensor  # (T, 1) or (T, D): the diagonal part of d prediction / d state
    step_variance: Tensor  # (T, 1) > 0: variance per element of the noise of each step, were the chain stochastic
    denoised_coef: Tensor  # (T, 2) [p, q]: p X + q E changes little from one step to the next
    drift: Tensor | None
    lo: Tensor
    hi: Tensor
    sq_diff: Tensor
    sq_norm: Tensor
    window: int
    backend: str
    scratch: Tensor | None = None  # (N,) uint8 for the ops, at least as much as `Solver.scratch` asks for
    window_scratch: Tensor | None = None  # (3, B, D) for what enters a sliding window
    draft: DraftRows | None = None

    @property
    def num_steps(self) -> int:
        return self.predictions.shape[0]

    @property
    def batch(self) -> int:
        return self.predictions.shape[1]


def history_dtype(given: torch.dtype | None, size: Size) -> torch.dtype:
    """What a history is stored in: what was asked for, else the dtype of the states."""
    return size.dtype if given is None else given


def check_history_dtype(given: torch.dtype | None) -> None:
    """Raises ValueError for what the kernels do not store."""
    if given not in (None, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"history_dtype: expected torch.float32, bfloat16, float16 or None, got {given!r}")


def ring_rows(old: list[int], new: list[int], width: int) -> Iterator[tuple[int, slice, slice]]:
    """(sample, rows, slots) for rows old[b] <= i < new[b], cut where the ring of `width` slots wraps around."""
    for b, (start, stop) in enumerate(zip(old, new)):
        while start < stop:
            end = min(stop, start + width - start % width)
            yield b, slice(start, end), slice(start % width, start % width + end - start)
            start = end


def move_rows(target: Tensor, ring: Tensor, old: Bounds, new: Bounds, backend: str) -> None:
    """target[i, b] <- ring[i % S, b] for rows old[b] <= i < new[b]; target: (R, B, D), ring: (S, B, D)."""
    if isinstance(old, Tensor) and isinstance(new, Tensor):
        copy_rows(target, ring, old, new, backend=backend)
        return
    assert isinstance(old, list)
    assert isinstance(new, list)
    for b, rows, slots in ring_rows(old, new, ring.shape[0]):
        target[rows, b].copy_(ring[slots, b])


def bounds_tensor(bounds: Bounds, like: Tensor) -> Tensor:
    """(B,) int32 on the device of `like`, without waiting for it where one bound serves all samples."""
    if isinstance(bounds, Tensor):
        return bounds
    if len(set(bounds)) == 1:
        return torch.full_like(like, bounds[0])
    return torch.tensor(bounds, dtype=like.dtype, device=like.device)


def row_numbers(row: Tensor, batch: int) -> Tensor:
    """row[b] * B + b: where row[b] of sample b is found in a time-major tensor flattened to (rows * B, D)."""
    return row.long() * batch + torch.arange(batch, device=row.device)


def repeat_rows(chain: Chain, old: Bounds, new: Bounds) -> None:
    """States old[b] < i <= new[b] become copies of state old[b]."""
    if isinstance(old, Tensor) and isinstance(new, Tensor):
        out = None if chain.window_scratch is None else chain.window_scratch[0]
        last = torch.index_select(chain.states.flatten(0, 1), 0, row_numbers(old, chain.batch), out=out)
        copy_rows(chain.states[1:], last[None], old, new, backend=chain.backend)
        return
    assert isinstance(old, list)
    assert isinstance(new, list)
    for b, (start, stop) in enumerate(zip(old, new)):
        chain.states[start + 1 : stop + 1, b] = chain.states[start, b]


def forget_rows(filled: Tensor, old: Bounds, new: Bounds) -> None:
    """filled[i % W, b] <- 0 for rows old[b] <= i < new[b]; filled: (W, B)."""
    if isinstance(old, Tensor) and isinstance(new, Tensor):
        slots = torch.arange(filled.shape[0], device=filled.device)[:, None]
        filled.masked_fill_((slots - old).remainder(filled.shape[0]) < new - old, 0)
        return
    assert isinstance(old, list)
    assert isinstance(new, list)
    for b, _, used in ring_rows(old, new, filled.shape[0]):
        filled[used, b] = 0


class Solver(Protocol):
    """One way to solve a chain. Solvers hold settings only; their memory is in the lease.

    What is said here every solver has; beyond that it is a `Stepper`, or a `Driver` that makes its rounds itself. A
    method `check(steps, lags, window)`, if there is one, raises ValueError for chains that it cannot solve.
    """

    @property
    def name(self) -> str: ...

    @property
    def guess(self) -> str:
        """The starting trajectory that the solver wants: "gaussian", "copy" or, of a solver that has one, "draft"."""
        ...

    @property
    def max_rounds(self) -> int | None: ...

    @property
    def safety(self) -> float:
        """Largest relative residual at which a solve may end, per unit of relative error allowed in the sample."""
        ...

    @property
    def freeze(self) -> float:
        """What an early timestep may have left to go when it is taken for final, in the same unit."""
        ...

    def plan(self, plan: Plan, size: Size) -> None:
        """Ask for the solver's own memory."""
        ...

    def start(self, lease: Lease) -> Any:
        """Forget everything; the returned memory is handed to the methods of a round."""
        ...


class Stepper(Solver, Protocol):
    """A way to turn the predictions of all active rows into the next iterate: the solvers of `iterate`'s own loop.

    A solver may have an int attribute `period`: `step`, `settle` and `enter` are then the same device work in rounds k
    and k + period, and may be recorded once and replayed. `settle` and `enter` must not read bounds that are tensors:
    `move_rows` and `forget_rows` take both kinds. With an attribute `by_step` that is True, rows are judged by the
    length of their last step alone, not by what they have left to go at the rate at which their steps get shorter. With
    a method `scratch(size: Size) -> int`, `chain.scratch` has at least so many bytes for the `workspace` of its ops. A
    method `init_constants(chain, memory)` is called once for every slab: what it writes there stays, from solve to solve.
    """

    def step(self, chain: Chain, memory: Any, round: int) -> None:
        """Predictions -> next states of rows [lo, hi), with sq_diff and sq_norm of the plain step against the old."""
        ...

    def settle(self, chain: Chain, memory: Any, round: int, old: Bounds, new: Bounds) -> None:
        """Rows old[b] <= i < new[b] are final: states[i+1] becomes the plain step from the last evaluation."""
        ...

    def enter(self, chain: Chain, memory: Any, old: Bounds, new: Bounds) -> None:
        """Rows old[b] <= i < new[b] have entered the window or were rebuilt: drop what is remembered of them."""
        ...
