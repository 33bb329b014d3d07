"""The processes that share the rows of model calls, and what they tell each other.

There is one kind of message, an all-gather of bytes, on the caller's own group. Whoever waits for the others looks once
a second whether one of them has left a note in the group's store; so a solve that one rank had to leave ends on all.
"""

from __future__ import annotations

import math
import struct
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from .._locks import Lock
from ..errors import DeqDiffError, RankError
from .notes import Notes
from .resolve import other_dimensions, resolve_group

LOOK = timedelta(seconds=1)  # how long a rank waits before it looks for notes of the others
TEXT = 1024  # bytes of a message in words

_KNOWN: weakref.WeakKeyDictionary[Any, Ranks] = weakref.WeakKeyDictionary()
_lock = Lock()
# all_gather_into_tensor until torch 2.12
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)


class Ranks:
    """One rank's end of a process group.

    Attributes:
        rank, size: this rank's number in the group, and how many there are.
        bytes, messages: what this rank has sent so far, to all others together, and in how many exchanges.
        now: this rank's clock.
        solving: how many solves, one inside the other, are being made.
        stamp: what the clock of rank 0 said when it sent its rows of the last call.
        usable: bytes of memory that a solve may use, the least of all ranks.
        others: those along the other dimensions of a mesh, if the group is a part of one: a model that is itself spread
            out over them must be called alike there, so whatever is decided by the time or by a callback is decided
            alike.
    """

    def __init__(self, group: Any) -> None:
        self._group = weakref.ref(group)
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.bytes = self.messages = 0
        self.now: Callable[[], float] = time.perf_counter
        self.stamp, self.usable = 0.0, math.inf
        self._kinds = {part.split(":")[0] for part in dist.get_backend_config(group).split(",")}
        self._notes = Notes(group, self.rank, self.size)
        self.solving, self.others = 0, list[Ranks]()
        self._gone = ""  # why nothing can be exchanged any more
        self._joint: BaseException | None = None  # the last error that all ranks have raised

    @classmethod
    def of(cls, group: Any) -> Ranks:
        """That of a ProcessGroup, a 1-D DeviceMesh or "world". Raises TypeError, ValueError."""
        found, others = resolve_group(group), [one for one in other_dimensions(group) if dist.get_world_size(one) > 1]
        with _lock:
            for one in (found, *others):
                if one not in _KNOWN:
                    _KNOWN[one] = cls(one)
            ranks = _KNOWN[found]
            ranks.others = [_KNOWN[one] for one in others] or ranks.others
            return ranks

    def device_for(self, device: torch.device) -> torch.device:
        """Where bytes are to lie that are exchanged about tensors on that device."""
        if device.type in self._kinds:
            return device
        return torch.device("cpu") if "cpu" in self._kinds else torch.device("cuda", torch.cuda.current_device())

    def gather(self, out: Tensor, own: Tensor) -> None:
        """The bytes of all ranks, (size, n), from (n,) of each. Raises RankError where one does not take part."""
        begin = partial(_all_gather, out.view(-1), own, async_op=True)
        self._make(begin, own.device, (self.size - 1) * own.numel())

    def add_up(self, values: Tensor) -> None:
        """In the place of `values` their sum over all ranks, the same bits everywhere. Raises RankError as `gather`."""
        if self.size > 1:
            place = values.to(self.device_for(values.device)).contiguous()
            begin = partial(dist.all_reduce, place, async_op=True)
            self._make(begin, place.device, 2 * (self.size - 1) * place.nbytes // self.size)
            values.copy_(place)

    def swap(self, out: Tensor, own: Tensor, taken: list[int], given: list[int]) -> None:
        """given[k] elements of `own` to every rank k, in order, and taken[k] of each into `out`, of one dimension.

        Raises RankError as `gather`."""
        device = self.device_for(own.device)
        place, there = (out, own) if own.device == device else (torch.empty_like(out, device=device), own.to(device))
        begin = partial(dist.all_to_all_single, place, there, taken, given, async_op=True)
        self._make(begin, device, (own.numel() - given[self.rank]) * own.element_size())
        if place is not out:
            out.copy_(place)

    def _make(self, begin: Callable[..., Any], device: torch.device, sent: int) -> None:
        """One exchange, and the count of it."""
        group = self._group()
        if group is None:
            raise RankError("the group was destroyed; make a new one")
        if self._gone:
            raise RankError(f"the group cannot be used any more: {self._gone}; make a new one")
        self.messages, self.bytes = self.messages + 1, self.bytes + sent
        try:
            self._wait(begin(group=group), device)
        except RuntimeError as error:
            raise self._lost(error) from error

    def _wait(self, work: Any, device: torch.device) -> None:
        """Until it is done; on a device, until it is queued: a rank that is lost there is the backend's to notice."""
        if device.type != "cpu":
            work.wait()
            return
        while not _made(work):
            if self._notes.any():
                raise RuntimeError("another rank has left a note")

    def exchange(self, numbers: Sequence[int]) -> list[list[int]]:
        """As many whole numbers of every rank, in the order of the ranks."""
        if self.size == 1:
            return [list(numbers)]
        device = self.device_for(torch.device("cpu"))
        own = torch.tensor(numbers, dtype=torch.int64, device=device)
        out = torch.empty(self.size, len(numbers), dtype=torch.int64, device=device)
        self.gather(out.view(torch.uint8), own.view(torch.uint8))
        found: list[list[int]] = out.tolist()
        return found

    def exchange_text(self, text: str) -> list[str]:
        """A message of every rank, cut off where it is too long."""
        raw = text.encode()[:TEXT]
        parts = [int.from_bytes(raw[k : k + 7], "little") for k in range(0, TEXT, 7)]
        rows = self.exchange([len(raw), *parts])
        return [b"".join(n.to_bytes(7, "little") for n in row)[:count].decode(errors="ignore") for count, *row in rows]

    def first(self, value: float) -> float:
        """The number that rank 0 has, of the whole mesh where there is one."""
        found = value if self.size == 1 else number(self.exchange([bits(value)])[0][0])
        return self.first_of_others(found)

    def first_of_others(self, value: float) -> float:
        """The number, the same in this group, that the first rank of the mesh has."""
        for other in self.others:
            value = other.first(value)
        return value

    def agreed(self, error: BaseException) -> BaseException:
        """The error, which all ranks raise: none of them need be told that this one leaves."""
        self._joint = error
        return error

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is done within it is done by all ranks alike. One that has to leave it alone tells the others."""
        self.solving += 1
        try:
            yield
        except (DeqDiffError, ValueError, TypeError, NotImplementedError):
            raise  # of arguments and numbers that are the same on all ranks
        except BaseException as error:
            if error is not self._joint and self.size > 1 and not self._gone:
                self._gone = f"rank {self.rank} has left a solve: {type(error).__name__}: {error}"
                self._notes.leave(f"{type(error).__name__}: {error}")
            raise
        finally:
            self.solving -= 1
            self._joint = self._joint if self.solving else None  # it holds on to what was in memory

    def _lost(self, error: RuntimeError) -> BaseException:
        """The error for an exchange that was not made."""
        left, missing = self._notes.collect()
        if left:
            rank, reason = next(iter(left.items()))
            self._gone = f"rank {rank} has left a solve: {reason}"
            if reason.startswith("KeyboardInterrupt"):
                return self.agreed(KeyboardInterrupt(self._gone))
        elif missing:
            rank = missing[0] if len(missing) == 1 else -1
            names = f"rank {rank}" if rank >= 0 else f"one of ranks {', '.join(map(str, missing))}"
            self._gone = f"{names} has died or hangs: exchange {self.messages} was not made within the group's timeout"
        else:
            rank = -1
            self._gone = f"exchange {self.messages} failed, though all ranks are there: {str(error).splitlines()[0]}"
        return RankError(self._gone, rank=rank)


def bits(value: float) -> int:
    """A float64 as a whole number, to be sent among such."""
    return int(struct.unpack("<q", struct.pack("<d", value))[0])


def number(sent: int) -> float:
    """What `bits` was given."""
    return float(struct.unpack("<d", struct.pack("<q", sent))[0])


def _made(work: Any) -> bool:
    """Whether an exchange is made, after a second at most. Raises RuntimeError where it has failed."""
    try:
        work.wait(LOOK)
    except RuntimeError:
        if not work.is_completed():
            return False
        work.wait()  # raises what it has failed with; it may also have been made since the look ended
    return True
