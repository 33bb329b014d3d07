"""A history in memory of the host, for states of which a device has no room for twenty sets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from .._devices import float64
from .elements import Elements, joined
from .history import History, through
from .node_grid import Transfer

STORED = torch.bfloat16  # of differences: half the memory, and they are good to three digits whatever their size


class LeasedTensors(Protocol):
    """Memory, as long as this is held on to."""

    def __getitem__(self, name: str) -> Tensor: ...


class HostMemory(Protocol):
    """Tensors of the host, of those shapes and dtypes."""

    def __call__(self, tensors: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> LeasedTensors: ...


class HostHistory(History):
    """The same as `NodeHistory`, without a draft, piece by piece of the elements.

    Kept are the state where the model was last asked and the remainder there, which the chain is made of, as they are;
    of the answers before, by how much each differs from the next newer one, in bfloat16. So no digits are lost where
    rounds converge, and the fixed point is the same.

    Args:
        columns, like, ridge, floor, elements, backend: see `History`.
        host: where memory comes from.
    """

    def __init__(
        self, columns: int, like: Tensor, ridge: float, floor: float, elements: Elements, host: HostMemory,
        backend: str = "auto",
    ) -> None:  # fmt: skip
        super().__init__(columns, like, ridge, floor, elements, backend)
        self.host, self.shape, self.dtype, self.device = host, tuple(like.shape), like.dtype, like.device
        self.pieces = elements.pieces(like.shape[2])
        self.kept: list[LeasedTensors | None] = []

    def _memory(self, at: slice) -> LeasedTensors:
        size = (*self.shape[:2], at.stop - at.start)
        older = ((self.columns - 1, *size), STORED)
        return self.host({"states": (size, self.dtype), "rest": (size, self.dtype), "steps": older, "changes": older})

    def _each(self) -> Iterator[tuple[slice, LeasedTensors]]:
        for k, at in enumerate(self.pieces):
            if k == len(self.kept):
                memory = self._memory(at)
                for name in ("states", "rest", "steps", "changes"):
                    memory[name].zero_()
                self.kept.append(memory)
            memory_there = self.kept[k]
            assert memory_there is not None
            yield at, memory_there

    def _load(self, stored: Tensor) -> Tensor:
        """On the device, as it is."""
        return stored.to(self.device, non_blocking=True)

    def _secants(self, stored: Tensor) -> Tensor:
        """(n B, H, d): older answers less the newest, from their differences."""
        found = self._load(stored).to(self.dtype).cumsum(0).permute(1, 2, 0, 3)
        return found.reshape(-1, *found.shape[2:])

    def push(self, asked: Tensor | None, states: Tensor, remainder: Tensor, off: Tensor | None = None) -> None:
        super().push(asked, states, remainder, off)
        rows, seen = None if asked is None else asked[..., None], (self.count > 1)[..., None]
        for piece, memory in self._each():
            values = (states[..., piece], "states", "steps"), (remainder[..., piece], "rest", "changes")
            for value, newest, older in values:
                before, kept = self._load(memory[newest]), self._load(memory[older])
                moved = torch.cat([((before - value) * seen)[None].to(STORED), kept])[: len(kept)]
                if rows is not None:
                    moved, value = torch.where(rows, moved, kept), torch.where(rows, value, before)
                memory[older].copy_(moved, non_blocking=True)
                memory[newest].copy_(value, non_blocking=True)

    def base(self) -> Tensor:
        found = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        for at, memory in self._each():
            found[..., at] = self._load(memory["rest"])
        return found

    def distance(self, states: Tensor) -> Tensor:
        parts = [((states[..., at] - self._load(memory["states"])).norm(dim=2),) for at, memory in self._each()]
        return joined(parts)[0]

    def moved(self) -> Tensor:
        if self.columns == 1:
            return torch.full_like(self.count, float("nan"), dtype=self.dtype)
        parts = [(self._load(memory["steps"][0]).to(self.dtype).norm(dim=2),) for _, memory in self._each()]
        return joined(parts)[0].masked_fill(self.count < 2, float("nan"))

    def moved_to(self, transfer: Transfer, old: Tensor, new: Tensor) -> HostHistory:
        kept = (self.columns, new, self.ridge, self.floor, self.elements)
        found = HostHistory(*kept, self.host, self.backend)
        for k, (at, memory) in enumerate(self._each()):
            target = found._memory(at)
            away = through(transfer.plain, old[..., at] - self._load(memory["states"]))
            target["states"].copy_(new[..., at] - away, non_blocking=True)
            target["rest"].copy_(through(transfer.scaled, self._load(memory["rest"])), non_blocking=True)
            for h in range(self.columns - 1):
                for name, weights in (("steps", transfer.plain), ("changes", transfer.scaled)):
                    value = through(weights, self._load(memory[name][h]).to(self.dtype))
                    target[name][h].copy_(value.to(STORED), non_blocking=True)
            found.kept.append(target)
            self.kept[k] = None  # so that there are no two of all
        self._move_marks(found, transfer)
        return found

    def prepare(self) -> None:
        if self.columns == 1:
            return
        gram, sizes = torch.zeros((), dtype=torch.float64), []
        for _, memory in self._each():
            dz = self._secants(memory["steps"])
            gram = float64(torch.bmm(dz, dz.transpose(1, 2))) + gram
            sizes.append((self._load(memory["states"]).norm(dim=2),))
        self._fit(gram, joined(sizes)[0])

    def correct(self, base: Tensor, states: Tensor, out: Tensor) -> None:
        for at, memory in self._each():
            torch.sub(states[..., at], self._load(memory["states"]), out=out[..., at])
        self.carry(out, out)
        out.add_(base)

    def carry(self, moved: Tensor, out: Tensor) -> None:
        if self.columns == 1:
            out.zero_()
            return
        along = torch.zeros((), dtype=torch.float64)
        for at, memory in self._each():
            piece = moved[..., at].flatten(0, 1)[:, None]
            along = float64(torch.bmm(piece, self._secants(memory["steps"]).transpose(1, 2))) + along
        weights = self._weights(along).to(self.dtype)
        for at, memory in self._each():
            out[..., at] = torch.bmm(weights, self._secants(memory["changes"])).view(*self.shape[:2], -1)
