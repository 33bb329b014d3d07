"""States of which every rank holds some elements, and how the model is asked about them.

The solver's work is elementwise but for norms and Gram matrices, which are added up over the ranks. For the model the
elements of some rows are brought together on one rank, and what it says is taken apart again: two all-to-alls a call.
"""

from __future__ import annotations

from copy import copy

import torch
from torch import Tensor

from .._devices import float64
from .._types import Rows
from ..errors import RankError
from ..memory import Lease, MemoryPlan
from ..nodes.elements import Elements
from ..ranks.faults import attempt, raise_on_all
from ..ranks.group import Ranks, bits, number
from ..ranks.sharded import unshared
from ..ranks.shares import share_of
from .system import System

NO_LIMIT = 2**62


class SharedElements(Elements):
    """This rank's share of the elements of a system's states.

    Args:
        system: whose model is shared out over the ranks.
        piece: see `Elements`.
    """

    def __init__(self, system: System, ranks: Ranks, piece: int | None = None) -> None:
        super().__init__(piece)
        self.ranks, self.system, self.total = ranks, system, system.numel
        self.shares = [share_of(self.total, ranks.size, rank) for rank in range(ranks.size)]
        start, stop = self.shares[ranks.rank]
        self.here, self.count = slice(start, stop), stop - start
        self.local = copy(system)  # for this rank's rows alone
        self.local.model = unshared(system.model)
        self.local.learned = {name: value for name, value in system.learned.items() if name != "max_batch"}
        limit = system.max_batch
        self.local.max_batch = None if limit is None else -(-limit // ranks.size)

    def numel(self, own: int) -> int:
        return self.total

    def sums(self, *own: Tensor) -> tuple[Tensor, ...]:
        flat = torch.cat([float64(part).flatten() for part in own])
        self.ranks.add_up(flat)
        parts = torch.split(flat, [part.numel() for part in own])
        return tuple(part.view(like.shape).to(like) for part, like in zip(parts, own, strict=True))

    def norms(self, *own: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            total.sqrt().to(like)
            for total, like in zip(self.sums(*(float64(part).square() for part in own)), own, strict=True)
        )

    def own(self, whole: Tensor) -> Tensor:
        """(..., D) -> this rank's elements, a copy."""
        return whole[..., self.here].contiguous()

    def whole(self, own: Tensor) -> Tensor:
        """(..., d) of every rank -> (..., D) on all."""
        rows, ranks = own.flatten(0, -2), self.ranks
        most = max(stop - start for start, stop in self.shares)
        device = ranks.device_for(own.device)
        sent = torch.zeros(len(rows), most, dtype=own.dtype, device=device)
        sent[:, : self.count].copy_(rows)
        out = torch.empty(ranks.size, *sent.shape, dtype=own.dtype, device=device)
        ranks.gather(out.view(ranks.size, -1).view(torch.uint8), sent.flatten().view(torch.uint8))
        parts = [part[:, : stop - start] for part, (start, stop) in zip(out, self.shares, strict=True)]
        return torch.cat(parts, 1).to(own.device).view(*own.shape[:-1], self.total)

    def rows_at_once(self, rows: int) -> int:
        """How many of so many rows are brought together in one go, over all ranks."""
        return min(rows, self.system.max_batch or rows)

    def plan(self, plan: MemoryPlan, rows: int) -> None:
        """Ask for what `ask` needs for that many rows."""
        rows, dtype = self.rows_at_once(rows), self.system.dtype
        own = -(-rows // self.ranks.size)
        self.local.plan(plan, min(own, self.local.max_batch or own))
        plan.add("parts", (rows, self.count), dtype)
        plan.add("exchanged", (own * self.total,), dtype)
        plan.add("own_states", (own, self.total), dtype)
        plan.add("own_predictions", (own, self.total), dtype)

    def ask(self, lease: Lease, states: Tensor, rows: Tensor, slots: Tensor, out: Tensor, round: int) -> None:
        """`NodeProblem.ask`, of this rank's elements."""
        most = len(lease["parts"])
        for flat, slot in zip(torch.split(rows, most), torch.split(slots, most), strict=True):
            parts = torch.index_select(states, 0, slot, out=lease["parts"][: len(slot)])
            self._ask(lease, flat, parts, round)
            out.index_copy_(0, slot, parts)
        self.system.model_evals += len(rows)
        self.system.model_calls += 1

    def _ask(self, lease: Lease, flat: Tensor, parts: Tensor, round: int) -> None:
        """Predictions in the place of states, (r, d)."""
        ranks, local, count = self.ranks, self.local, len(flat)
        start, stop = share_of(count, ranks.size, ranks.rank)
        mine = flat[start:stop]
        states, predictions = lease["own_states"][: stop - start], lease["own_predictions"][: stop - start]
        self._exchange(lease, parts, states, forward=True)
        slots = torch.arange(stop - start, device=flat.device)
        asked = Rows(mine, 0, local.num_steps, stop - start, slots)
        done = attempt(lambda: local.evaluate(states[:, None], predictions, asked, lease, round))
        limit = local.learned.get("max_batch", NO_LIMIT)
        table = ranks.exchange([done.status, limit, bits(ranks.now())])
        ranks.stamp = number(table[0][2])
        try:
            raise_on_all(ranks, [row[0] for row in table], done, local.times[mine // local.batch])
        except RankError as error:
            error.round = round or None
            raise
        self._learn(min(row[1] for row in table))
        self._exchange(lease, parts, predictions, forward=False)

    def _learn(self, limit: int) -> None:
        """What calls have told of the model, on one of the ranks or on this one."""
        if "keeps_inputs" in self.local.learned:
            self.system.learned["keeps_inputs"] = 1
        if limit < NO_LIMIT:
            self.local.max_batch = limit
            self.system.learned["max_batch"] = limit * self.ranks.size

    def _exchange(self, lease: Lease, parts: Tensor, own: Tensor, forward: bool) -> None:
        """From every rank's elements of all rows, (r, d), to all elements of this rank's rows, (s, D), or back."""
        ranks = self.ranks
        rows = [stop - start for start, stop in (share_of(len(parts), ranks.size, k) for k in range(ranks.size))]
        taken, given = [len(own) * (stop - start) for start, stop in self.shares], [n * self.count for n in rows]
        flat = lease["exchanged"][: len(own) * self.total]
        blocks = zip(torch.split(flat, taken), self.shares, strict=True)
        if forward:
            ranks.swap(flat, parts.view(-1), taken, given)
            for block, (start, stop) in blocks:
                own[:, start:stop].copy_(block.view(len(own), stop - start))
            return
        for block, (start, stop) in blocks:
            block.view(len(own), stop - start).copy_(own[:, start:stop])
        ranks.swap(parts.view(-1), flat, given, taken)
