"""What the rounds on nodes are given, and what they return."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from .composite import LinearChain
from .draft_answers import Draft
from .elements import ALL_ELEMENTS, Elements
from .guess import SampleGuess
from .host_history import HostMemory
from .node_grid import NodeGrid

Ask = Callable[[Tensor, Tensor, Tensor, Tensor, int], None]
"""ask(states, rows, slots, predictions, round): fills predictions[slots]: (R, D) at states[slots]: (R, D), which are of
timestep i and sample b where rows: (r,) is i B + b."""


class Spots(NamedTuple):
    """Timesteps at which one sample's predictions are to be compared with what is interpolated; none is fine."""

    timesteps: tuple[int, ...] = ()
    sample: int = 0
    again: tuple[int, ...] = ()  # of these, what to ask in the rounds that follow too


class Cache(Protocol):
    """`make()`, or what it returned for that key before."""

    def __call__(self, key: Hashable, make: Callable[[], Any]) -> Any: ...


@dataclass
class NodeProblem:
    """A chain to solve by rounds on nodes.

    Attributes:
        chain, classes: the linear model; (D,) int32, the class of every element, None for a single one.
        density: (T,), how nodes are to be spread.
        sizes: numbers of them, see `round_sizes`.
        most: of them, whatever the tolerance.
        start: (B, D), the noise.
        drift: (T, B, D), the frozen noise of every step, or None.
        ask: calls the model.
        draft: a cheap stand-in for the model, or None.
        tol: relative L2 error allowed in a sample.
        history, ridge, floor: of the secants, see `QuasiNewton`.
        spots: to be asked beside the nodes.
        guess: of the sample, or None.
        elements: which of a state are here: these D.
        host: where the history is kept, None: with the states.
        amplifies: whether one estimate of the error alone is not believed, see `row_tables.amplifies`.
    """

    chain: LinearChain
    classes: Tensor | None
    density: Tensor
    sizes: list[int]
    most: int
    start: Tensor
    drift: Tensor | None
    ask: Ask
    draft: Draft | None
    tol: float
    history: int
    ridge: float
    floor: float
    backend: str
    cache: Cache
    spots: Spots
    guess: SampleGuess | None = None
    elements: Elements = ALL_ELEMENTS
    host: HostMemory | None = None
    amplifies: bool = False


@dataclass
class NodeOutcome:
    """What the rounds on nodes have found."""

    grid: NodeGrid
    states: Tensor  # (n + 1, B, D), the last one the samples
    remainder: Tensor  # (n, B, D) of the predictions, by which the states follow
    done: list[bool]
    """Which samples are within the tolerance, as far as the estimate can tell."""
    error_estimate: Tensor  # (B,)
    trace: list[Tensor]  # (B,) of every round
    evaluated: int
    """How many timesteps were asked in some round."""
    stopped: bool = False
    """Whether `report` asked for the end."""
    broken: bool = False
    """Whether states are not finite: nothing of this is of use."""
    rough: bool | None = None
    """Whether the model is less smooth in time than interpolation takes it to be; None where no spots were asked."""
    check_evals: int = 0
    """Of the model, at spots."""
