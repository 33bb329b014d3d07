"""Where the memory of rounds on nodes is: on the device, with the history on the host, or shared out over ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..memory import Lease, MemoryPlan, SolverMemory
from ..nodes.elements import ALL_ELEMENTS, Elements
from ..nodes.growth import TOGETHER
from ..nodes.host_history import STORED, HostMemory
from .shared_elements import SharedElements
from .system import System

if TYPE_CHECKING:
    from .options import Options

ITERATES = 8  # states, remainders, answers, surprises and what is made of them in a round, old and new
CARRIED = 9  # more of them, where all sums of `nodes.growth` are carried at once
ITERATES_LEFT = 11  # where the history is on the host and what is made is made in pieces
PIECE_BYTES = 1 << 28  # that the host keeps of a piece; pinned memory comes in powers of two
PIECES = 3  # of that size that are on the device at a time


@dataclass(frozen=True)
class Placement:
    """Of one solve.

    Attributes:
        elements: which of a state are on this rank.
        host: where the history is kept, None: on the device.
    """

    system: System
    memory: SolverMemory
    elements: Elements = ALL_ELEMENTS
    host: HostMemory | None = None

    @classmethod
    def of(cls, system: System, options: Options) -> Placement:
        """As the options say."""
        memory, piece = options.memory, None
        if options.offload:
            rows = system.most_nodes * system.batch
            piece = max(PIECE_BYTES // (rows * _kept(system, options.solver)), 1)
        elements = Elements(piece)
        if options.shard_states and options.ranks is not None and options.ranks.size > 1:
            elements = SharedElements(system, options.ranks, piece)

        def host(tensors: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> Lease:
            plan = MemoryPlan()
            for name, (shape, dtype) in tensors.items():
                plan.add(name, shape, dtype)
            return memory.lease(plan, "cpu", pinned=system.device.type == "cuda")

        return cls(system, memory, elements, host if options.offload else None)

    @property
    def shared(self) -> SharedElements | None:
        """The elements, where they are shared out."""
        return self.elements if isinstance(self.elements, SharedElements) else None

    @property
    def numel(self) -> int:
        """Elements of a state on this rank."""
        return self.system.numel if self.shared is None else self.shared.count

    def own(self, whole: Tensor) -> Tensor:
        """This rank's elements of (..., D)."""
        return whole if self.shared is None else self.shared.own(whole)

    def whole(self, own: Tensor) -> Tensor:
        """(..., D) of which every rank has some."""
        return own if self.shared is None else self.shared.whole(own)

    def plan(self) -> MemoryPlan:
        """What model calls at nodes and the noise of the chain need on the device."""
        plan, system = MemoryPlan(), self.system
        rows = system.most_nodes * system.batch
        if self.shared is None:
            system.plan(plan, min(rows, system.max_batch or rows))
        else:
            self.shared.plan(plan, rows)
        if system.schedule.stochastic and self.host is None:
            plan.add("drift", *self._drift())
        return plan

    def drift(self, lease: Lease) -> Tensor | None:
        """Memory for the noise of the chain, None where there is none. lease: of `plan`."""
        if self.host is not None and self.system.schedule.stochastic:
            return self.host({"drift": self._drift()})["drift"]
        return lease.get("drift")

    def _drift(self) -> tuple[tuple[int, int, int], torch.dtype]:
        return (self.system.num_steps, self.system.batch, self.numel), self.system.dtype

    def bytes(self, settings: Any) -> tuple[int, int]:
        """On the device and on the host: what model calls need, then columns, secants and iterates at the nodes.

        Columns are held twice while they are moved to other nodes. settings: of the solver, see `node_problem`.
        """
        system, history = self.system, settings.history
        held: int = self.plan().layout()[1]
        rows = system.most_nodes * system.batch
        size: int = rows * self.numel * system.dtype.itemsize
        if self.host is None:
            columns = (2 if system.draft is None else 3) * (history + 1)
            carried = CARRIED if rows * self.numel <= TOGETHER else 0
            tensors: int = 2 * columns + 2 * history + ITERATES + carried + system.schedule.stochastic
            return held + tensors * size, 0
        kept: int = rows * self.numel * _kept(system, settings)
        drift = self.numel * system.num_steps * system.batch * system.dtype.itemsize * system.schedule.stochastic
        left = (ITERATES_LEFT + system.schedule.stochastic) * size
        piece = min(PIECE_BYTES, kept)  # on the host one is there twice while it is moved to other nodes
        return held + left + PIECES * piece, kept + piece + drift


def _kept(system: System, settings: Any) -> int:
    """Bytes that the host keeps of an element of a state at a node."""
    return 2 * system.dtype.itemsize + 2 * int(settings.history) * STORED.itemsize
