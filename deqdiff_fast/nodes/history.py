"""Secants at the nodes: what the model answered in the last rounds, and the Jacobian that follows from it."""

from __future__ import annotations

import torch
from torch import Tensor

from .._devices import float64
from ..kernels import secant_fit
from .elements import ALL_ELEMENTS, Elements
from .node_grid import Transfer

SHORTEST = 0.02  # step worth keeping, relative to the longest: stretched that much, it says little
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

    draft: Tensor | None = None

    def __init__(
        self, columns: int, like: Tensor, ridge: float, floor: float, elements: Elements, backend: str = "auto"
    ) -> None:
        self.columns, self.ridge, self.floor, self.elements = columns, ridge, floor, elements
        self.backend = backend
        self.ridges = torch.full((columns, *like.shape[:2]), ridge, dtype=like.dtype, device=like.device)
        self.count = torch.zeros(like.shape[:2], dtype=torch.int32, device=like.device)
        self.guess_error: Tensor | None = None  # (n, B), of the ends that were interpolated

    def push(self, asked: Tensor | None, states: Tensor, predictions: Tensor, draft: Tensor | None) -> None:
        """New answers at the nodes asked: (n, B) bool, None for all; (n, B, D) each."""
        if asked is None:
            self.ridges[1:] = self.ridges[:-1].clone()
            self.ridges[0] = self.ridge
            self.count.add_(1).clamp_max_(self.columns)
            return
        for h in range(self.columns - 1, 0, -1):
            torch.where(asked, self.ridges[h - 1], self.ridges[h], out=self.ridges[h])
        self.ridges[0].masked_fill_(asked, self.ridge)
        self.count.add_(asked).clamp_max_(self.columns)

    def base(self, slope: Tensor) -> Tensor:
        """(n, B, D): the remainders as the model last gave them, for slopes (n, 1, D or 1)."""
        raise NotImplementedError

    def distance(self, states: Tensor) -> Tensor:
        """(n, B): lengths, over the elements here, of the steps from where the model was last asked."""
        raise NotImplementedError

    def moved(self) -> Tensor:
        """(n, B): lengths, over the elements here, of the steps between the last two answers, NaN where there is one
        only."""
        raise NotImplementedError

    def moved_to(self, transfer: Transfer, old: Tensor, new: Tensor, slopes: tuple[Tensor, Tensor]) -> History:
        """The same for other nodes: what the model would have answered there, by interpolation in time.

        Args:
            old, new: the states as they are now at these nodes and at the others, (n, B, D) and (m, B, D).
            slopes: at these nodes and at the others.
        """
        raise NotImplementedError

    def prepare(self, slope: Tensor) -> None:
        """Secants and their Gram matrices, for slopes (n, 1, D or 1)."""
        raise NotImplementedError

    def correct(self, base: Tensor, states: Tensor, out: Tensor) -> None:
        """out <- base + the secants' part for states that have moved on: (n, B, D) each."""
        raise NotImplementedError

    def _move_marks(self, found: History, transfer: Transfer) -> None:
        """Ridges and counts at other nodes."""
        for h, ridges in enumerate(found.ridges):
            guessed = torch.full_like(ridges, GUESSED_RIDGE)
            known = through((transfer.plain == 1).to(ridges.dtype), self.ridges[h])
            torch.where(transfer.kept[:, None], known, guessed, out=ridges)
        found.count.copy_(self.count.amin(0).expand_as(found.count))

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
        secant_fit(self.fit, *there, self.floor, SHORTEST, GUESSED_RIDGE / 2, NONLINEAR, backend=self.backend)

    def _weights(self, along: Tensor) -> Tensor:
        """(n B, H, 1) of the secants' remainders, from float64 products of secants and steps over the elements here."""
        (along,) = self.elements.sums(along)
        weights: Tensor = torch.bmm(self.fit, along).nan_to_num_(0.0, 0.0, 0.0)
        return weights


class NodeHistory(History):
    """The last H + 1 answers at each of n nodes of B samples, the newest in column 0, with the states.

    Args:
        columns, like, ridge, floor, elements, backend: see `History`.
        drafted: whether a draft's predictions are kept too; secants are then those of the difference to it.
    """

    def __init__(
        self, columns: int, like: Tensor, ridge: float, floor: float, drafted: bool = False,
        elements: Elements = ALL_ELEMENTS, backend: str = "auto",
    ) -> None:  # fmt: skip
        super().__init__(columns, like, ridge, floor, elements, backend)
        self.z = like.new_zeros(columns, *like.shape)
        self.e, self.draft = torch.zeros_like(self.z), torch.zeros_like(self.z) if drafted else None
        self.dz: Tensor | None = None
        self.dr: Tensor | None = None

    def push(self, asked: Tensor | None, states: Tensor, predictions: Tensor, draft: Tensor | None) -> None:
        super().push(asked, states, predictions, draft)
        columns = [(self.z, states), (self.e, predictions)]
        if self.draft is not None and draft is not None:
            columns.append((self.draft, draft))
        for kept, new in columns:
            if asked is None:
                kept[1:] = kept[:-1].clone()
                kept[0] = new
                continue
            rows = asked[..., None]
            for h in range(len(kept) - 1, 0, -1):
                torch.where(rows, kept[h - 1], kept[h], out=kept[h])
            torch.where(rows, new, kept[0], out=kept[0])

    def base(self, slope: Tensor) -> Tensor:
        return self.e[0] - slope * self.z[0]

    def distance(self, states: Tensor) -> Tensor:
        length: Tensor = (states - self.z[0]).norm(dim=2)
        return length

    def moved(self) -> Tensor:
        if len(self.z) == 1:
            return torch.full_like(self.count, float("nan"), dtype=self.z.dtype)
        length: Tensor = (self.z[0] - self.z[1]).norm(dim=2)
        return length.masked_fill_(self.count < 2, float("nan"))

    def moved_to(self, transfer: Transfer, old: Tensor, new: Tensor, slopes: tuple[Tensor, Tensor]) -> NodeHistory:
        found = NodeHistory(
            len(self.z), new, self.ridge, self.floor, self.draft is not None, self.elements, self.backend
        )
        before, after = slopes
        for h in range(len(self.z)):
            torch.sub(new, through(transfer.plain, old - self.z[h]), out=found.z[h])
            kept = [(self.e, found.e)]
            if self.draft is not None and found.draft is not None:
                kept.append((self.draft, found.draft))
            for values, target in kept:
                rest = through(transfer.scaled, values[h] - before * self.z[h])
                torch.add(rest, after * found.z[h], out=target[h])
        self._move_marks(found, transfer)
        return found

    def prepare(self, slope: Tensor) -> None:
        if len(self.z) == 1:
            return
        self.dz = self.dr = None  # their memory, before that of the new ones
        dz, dr = self.z[1:] - self.z[0], self.e[1:] - self.e[0]
        if self.draft is None:
            dr.addcmul_(slope, dz, value=-1)
        else:
            dr -= self.draft[1:] - self.draft[0]
        self.dz, self.dr = (secants.flatten(1, 2).transpose(0, 1) for secants in (dz, dr))  # (n B, H, D)
        self._fit(torch.bmm(self.dz, self.dz.transpose(1, 2)), self.z[0].norm(dim=2))

    def correct(self, base: Tensor, states: Tensor, out: Tensor) -> None:
        dz, dr = self.dz, self.dr
        if dz is None or dr is None:
            out.copy_(base)
            return
        moved = (states - self.z[0]).view(len(dz), -1, 1)
        weights, numel = self._weights(float64(torch.bmm(dz, moved))).to(dz), dz.shape[2]
        torch.baddbmm(base.reshape(-1, 1, numel), weights.transpose(1, 2), dr, out=out.view(-1, 1, numel))


def through(weights: Tensor, values: Tensor) -> Tensor:
    """(m, n) weights of values (n, ...) -> (m, ...)."""
    found: Tensor = torch.mm(weights, values.flatten(1)).view(len(weights), *values.shape[1:])
    return found
