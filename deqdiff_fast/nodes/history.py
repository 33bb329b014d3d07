"""Secants at the nodes: what the model answered in the last rounds, and the Jacobian that follows from it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from .._devices import float64
from ..kernels import secant_fit
from .elements import ALL_ELEMENTS, Elements
from .node_grid import Transfer

GUESSED_RIDGE = 1e-2  # of a secant with an end that was interpolated and not asked, at least
NONLINEAR = 0.3  # by how much a prediction may change with the state beside the slope


class History:
    """What is small of a history, and the fit of its secants.

    Each node and sample counts for itself: one that is not asked in a round keeps what it has. The correction of a
    prediction is the multisecant one of `kernels.newton_scan` (Fang and Saad 2009, doi 10.1002/nla.617), for all nodes
    at once.

    Args:
        columns: H + 1.
        like: (n, B, D).
        ridge: of the fit, on normalised columns.
        floor: shortest step worth keeping, relative to the state.
        elements: which D are.
        backend: of the op that fits the secants.
    """

    off: list[Tensor] | None = None  # (n, B, D) each, the answers less a draft's, where there is one

    def __init__(
        self, columns: int, like: Tensor, ridge: float, floor: float, elements: Elements, backend: str = "auto"
    ) -> None:
        self.columns, self.ridge, self.floor, self.elements = columns, ridge, floor, elements
        self.backend = backend
        self.ridges = torch.full((columns, *like.shape[:2]), ridge, dtype=like.dtype, device=like.device)
        self.count = torch.zeros(like.shape[:2], dtype=torch.int32, device=like.device)
        self.guess_error: Tensor | None = None  # (n, B), of the ends that were interpolated

    def push(self, asked: Tensor | None, states: Tensor, remainder: Tensor, off: Tensor | None = None) -> None:
        """New answers, asked: (n, B) bool of which nodes and samples, None for all; states and remainders, and what
        answers are less a draft's, (n, B, D) each."""
        new = torch.cat([torch.full_like(self.ridges[:1], self.ridge), self.ridges[:-1]])
        self.ridges = new if asked is None else torch.where(asked, new, self.ridges)
        self.count.add_(1 if asked is None else asked).clamp_max_(self.columns)

    def base(self) -> Tensor:
        """(n, B, D): the remainders as the model last gave them."""
        raise NotImplementedError

    def distance(self, states: Tensor) -> Tensor:
        """(n, B): lengths, over the elements here, of the steps from where the model was last asked."""
        raise NotImplementedError

    def moved(self) -> Tensor:
        """(n, B): lengths, over the elements here, of the steps between the last two answers, NaN where there is one
        only."""
        raise NotImplementedError

    def moved_to(self, transfer: Transfer, old: Tensor, new: Tensor) -> History:
        """The same for other nodes: what the model would have answered there, by interpolation in time; old, new: the
        states as they are now at these nodes and at the others, (n, B, D) and (m, B, D)."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Secants and their Gram matrices."""
        raise NotImplementedError

    def correct(self, base: Tensor, states: Tensor, out: Tensor) -> None:
        """out <- base + the secants' part for states that have moved on: (n, B, D) each."""
        raise NotImplementedError

    def carry(self, moved: Tensor, out: Tensor) -> None:
        """out <- the secants' part for states that move by that much: (n, B, D) each; (n, B P, D), P moves of every
        sample, where the history is with the states."""
        raise NotImplementedError

    def _move_marks(self, found: History, transfer: Transfer) -> None:
        """Ridges and counts at other nodes."""
        for h, ridges in enumerate(found.ridges):
            guessed = torch.full_like(ridges, GUESSED_RIDGE)
            known = through((transfer.plain == 1).to(ridges.dtype), self.ridges[h])
            torch.where(transfer.kept[:, None], known, guessed, out=ridges)
        found.count.copy_(self.count.amax(0).expand_as(found.count))

    def _fit(self, gram: Tensor, size: Tensor) -> None:
        """From Gram matrices of the secants, (n B, H, H), and sizes of the states, (n, B), over the elements here."""
        (gram,), (size,) = self.elements.sums(gram), self.elements.norms(size)
        guess_error = self.guess_error
        rows = (
            gram, size.flatten(), self.count.flatten(), self.ridges[1:].flatten(1),
            None if guess_error is None else guess_error.flatten(),
        )  # fmt: skip
        place = torch.device("cpu") if gram.device.type == "mps" else gram.device  # MPS has no float64
        there = (row if row is None or row.device == place else row.to(place) for row in rows)
        self.fit = torch.empty(gram.shape, dtype=torch.float64, device=place)
        secant_fit(self.fit, *there, self.floor, GUESSED_RIDGE / 2, NONLINEAR, backend=self.backend)

    def _weights(self, along: Tensor) -> Tensor:
        """(n B, 1, h) of the secants' remainders, from float64 products of h secants and steps over elements here."""
        (along,), count = self.elements.sums(along), along.shape[2]
        weights: Tensor = torch.bmm(along, self.fit[:, :count, :count]).nan_to_num_(0.0, 0.0, 0.0)
        return weights


class NodeHistory(History):
    """The last H + 1 answers at each of n nodes of B samples, the newest in column 0, with the states.

    Args:
        columns, like, ridge, floor, elements, backend: see `History`.
        drafted: whether there is a draft; secants are then those of the difference to it.
    """

    def __init__(
        self, columns: int, like: Tensor, ridge: float, floor: float, drafted: bool = False,
        elements: Elements = ALL_ELEMENTS, backend: str = "auto",
    ) -> None:  # fmt: skip
        super().__init__(columns, like, ridge, floor, elements, backend)
        self.z, self.rest = list[Tensor](), list[Tensor]()  # states and remainders
        self.off = list[Tensor]() if drafted else None
        self.dz: Tensor | None = None
        self.dr: Tensor | None = None

    def push(self, asked: Tensor | None, states: Tensor, remainder: Tensor, off: Tensor | None = None) -> None:
        super().push(asked, states, remainder, off)
        rows = None if asked is None else asked[..., None]
        for kept, new in ((self.z, states), (self.rest, remainder), (self.off, off)):
            if kept is not None and new is not None:
                self._shift(kept, new, rows)

    def _shift(self, kept: list[Tensor], new: Tensor, rows: Tensor | None) -> None:
        """A new first column, and the others one further; one that a row lacks is what it has for the oldest."""
        if len(kept) < self.columns:
            kept.append(kept[-1] if kept else new)
        for h in range(len(kept) - 1, 0, -1):
            kept[h] = kept[h - 1] if rows is None else torch.where(rows, kept[h - 1], kept[h])
        kept[0] = new.clone() if rows is None else torch.where(rows, new, kept[0])

    def base(self) -> Tensor:
        return self.rest[0]

    def distance(self, states: Tensor) -> Tensor:
        length: Tensor = (states - self.z[0]).norm(dim=2)
        return length

    def moved(self) -> Tensor:
        length: Tensor = (self.z[0] - self.z[:2][-1]).norm(dim=2)
        return length.masked_fill_(self.count < 2, float("nan"))

    def moved_to(self, transfer: Transfer, old: Tensor, new: Tensor) -> NodeHistory:
        kept = (self.columns, new, self.ridge, self.floor, self.off is not None, self.elements, self.backend)
        found = NodeHistory(*kept)
        found.z = [new - through(transfer.plain, old - z) for z in self.z]
        found.rest = [through(transfer.scaled, rest) for rest in self.rest]
        if self.off is not None:
            found.off = [through(transfer.scaled, off) for off in self.off]
        self._move_marks(found, transfer)
        return found

    def prepare(self) -> None:
        self.dz = self.dr = None  # their memory, before that of the new ones
        if len(self.z) < 2:
            return
        self.dz, self.dr = (secants(kept) for kept in (self.z, self.rest if self.off is None else self.off))
        gram, later = torch.bmm(self.dz, self.dz.transpose(1, 2)), self.columns - len(self.z)
        self._fit(pad(gram, (0, later, 0, later)) if later else gram, self.z[0].norm(dim=2))

    def correct(self, base: Tensor, states: Tensor, out: Tensor) -> None:
        self.carry(states - self.z[0], out, base)

    def carry(self, moved: Tensor, out: Tensor, base: Tensor | None = None) -> None:
        dz, dr = self.dz, self.dr
        if dz is None or dr is None:
            out.zero_() if base is None else out.copy_(base)
            return
        size, beta = (len(dz), -1, dz.shape[2]), float(base is not None)
        moved = moved.view(size)  # rows from the left: five times as fast on a CPU
        weights = self._weights(float64(torch.bmm(moved, dz.transpose(1, 2)))).to(dz)
        torch.baddbmm((out if base is None else base).view(size), weights, dr, beta=beta, out=out.view(size))


def secants(kept: list[Tensor]) -> Tensor:
    """(n B, h, D): each column but the first, (n, B, D), less the first."""
    return torch.stack(kept[1:]).sub_(kept[0]).flatten(1, 2).transpose(0, 1)


def through(weights: Tensor, values: Tensor) -> Tensor:
    """(m, n) weights of values (n, ...) -> (m, ...)."""
    found: Tensor = torch.mm(weights, values.flatten(1)).view(len(weights), *values.shape[1:])
    return found
