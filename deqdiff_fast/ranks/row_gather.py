"""One all-gather that gives every rank all rows of a call, and tells it what has become of the others."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .._devices import users_autocast
from ..errors import ModelOutputError, RankError
from .faults import OTHER_FORM, Attempt, attempt, raise_on_all
from .group import Ranks, bits, number
from .shares import HEADER, message_bytes, share_of

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MOST_AXES = 16  # of a row
_WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class RowForm:
    """Shape and dtype of a row."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Of a row."""
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize


def checksum(*tensors: Tensor) -> Tensor:
    """A whole number that tells tensors with other bits apart, on their device."""
    total = torch.zeros((), dtype=torch.int64, device=tensors[0].device)
    for k, tensor in enumerate(tensors, 1):
        bits = tensor.detach().contiguous().view(_WHOLE[tensor.dtype.itemsize])
        total = total + k * bits.sum(dtype=torch.int64)
    return total


@dataclass
class RowGather:
    """Shares out the rows of calls, each of them with one all-gather, in memory that is kept."""

    ranks: Ranks
    _forms: dict[Hashable, RowForm] = field(default_factory=dict)
    _memory: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __call__(
        self, kind: Hashable, rows: int, seen: Tensor, work: Callable[[], Tensor | None], times: Tensor | None = None
    ) -> Tensor:
        """All rows of a call.

        Args:
            kind: what decides the form of a row; the same on all ranks.
            rows: how many there are.
            seen: a number that is the same on all ranks that were asked the same.
            work: makes this rank's own rows, None if it has none.
            times: of this rank's rows.

        Raises:
            RankError, ModelOutputError, torch.OutOfMemoryError, KeyboardInterrupt: on all ranks, whatever went wrong on
                one; RankError also where ranks were not asked the same.
        """
        done = attempt(work)
        while True:
            form = self._forms.get(kind) or self._agree(kind, done, times)
            other = isinstance(done.value, Tensor) and _form_of(done.value) != form
            statuses, found = self._exchange(form, rows, seen, done, OTHER_FORM if other else done.status)
            if OTHER_FORM not in statuses:
                raise_on_all(self.ranks, statuses, done, times)
                return found
            del self._forms[kind]

    def _agree(self, kind: Hashable, done: Attempt, times: Tensor | None) -> RowForm:
        """The form of a row of that kind, where it is not known yet: from those that have made some."""
        own: list[int] = [-1] * (MOST_AXES + 2)
        status = done.status
        if isinstance(done.value, Tensor):
            form = _form_of(done.value)
            own[:2] = DTYPES.index(form.dtype), len(form.shape)
            own[2 : 2 + len(form.shape)] = form.shape
        table = self.ranks.exchange([status, *own])
        raise_on_all(self.ranks, [row[0] for row in table], done, times)
        forms = {tuple(row[1:]) for row in table if row[1] >= 0}
        if len(forms) != 1:
            raise self.ranks.agreed(
                ModelOutputError("the model returned rows of other shapes or dtypes on some ranks than on others")
            )
        dtype, axes, *shape = forms.pop()
        self._forms[kind] = RowForm(tuple(shape[:axes]), DTYPES[dtype])
        return self._forms[kind]

    def _exchange(self, form: RowForm, rows: int, seen: Tensor, done: Attempt, status: int) -> tuple[list[int], Tensor]:
        """(statuses of all ranks, all rows)."""
        ranks, row_bytes = self.ranks, form.bytes
        size = message_bytes(rows, ranks.size, row_bytes)
        own, out = self._buffers(ranks.device_for(seen.device), size)
        header, now = own[:HEADER].view(torch.int64), bits(ranks.now())
        header.copy_(torch.tensor([status, rows, 0, ranks.messages, now], dtype=torch.int64, device="cpu"))
        header[2].copy_(seen)
        if isinstance(done.value, Tensor) and status == 0:
            place = own[HEADER : HEADER + len(done.value) * row_bytes].view(form.dtype)
            place.view(len(done.value), *form.shape).copy_(done.value)
        ranks.gather(out, own)
        heads = out[:, :HEADER].view(torch.int64).tolist()
        ranks.stamp = number(heads[0][4])
        self.compare([head[1:4] for head in heads])
        found = torch.empty(rows, *form.shape, dtype=form.dtype, device=seen.device)
        for rank in range(ranks.size):
            start, stop = share_of(rows, ranks.size, rank)
            part = out[rank, HEADER : HEADER + (stop - start) * row_bytes].view(form.dtype)
            found[start:stop].copy_(part.view(stop - start, *form.shape))
        return [head[0] for head in heads], found

    def compare(self, seen: list[list[int]]) -> None:
        """Raises RankError unless all ranks were asked the same, (size, k) numbers of what they were asked."""
        for rank, numbers in enumerate(seen):
            if numbers != seen[0]:
                raise self.ranks.agreed(
                    RankError(
                        f"rank {rank} has called the model on other rows than rank 0: something that is not the same "
                        "on all ranks has entered the solve (a loss, a callback that writes, a model that does)",
                        rank=rank,
                    )
                )

    def _buffers(self, device: torch.device, size: int) -> tuple[Tensor, Tensor]:
        """(size,) and (ranks, size) bytes; larger ones are made where they do not suffice."""
        count = self.ranks.size
        own, out = self._memory.get(device, (torch.empty(0), torch.empty(0)))
        if own.numel() < size:
            own = torch.zeros(size, dtype=torch.uint8, device=device)
            out = torch.zeros(count * size, dtype=torch.uint8, device=device)
            self._memory[device] = own, out
        return own[:size], out[: count * size].view(count, size)


def _form_of(value: Tensor) -> RowForm:
    return RowForm(tuple(value.shape[1:]), value.dtype)


def kind_of(*values: Any) -> Hashable:
    """What the form of a model's rows depends on besides its arguments."""
    return (*values, users_autocast("cpu"), users_autocast("cuda"))
