"""An error of one rank becomes an error of all."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelOutputError, RankError
from ..model.padding import out_of_memory
from .group import TEXT, Ranks

OK, ERROR, MEMORY, INTERRUPT, OUTPUT, OTHER_FORM = range(6)


@dataclass
class Attempt:
    """What came of a rank's part of the work."""

    value: Any = None
    error: BaseException | None = None

    @property
    def status(self) -> int:
        """A number for it."""
        if self.error is None:
            return OK
        if isinstance(self.error, KeyboardInterrupt):
            return INTERRUPT
        if isinstance(self.error, ModelOutputError):
            return OUTPUT
        return MEMORY if out_of_memory(self.error) else ERROR


def attempt(work: Callable[[], Any]) -> Attempt:
    """Do it, whatever happens."""
    try:
        return Attempt(work())
    except BaseException as error:  # also Ctrl-C: the others would wait for this rank
        return Attempt(error=error)


def raise_on_all(ranks: Ranks, statuses: list[int], own: Attempt, times: Tensor | None = None) -> None:
    """Raise the same error on all ranks if one has a status of an error; all call this with the same statuses.

    times: (n,) those of this rank's rows, for the message.
    """
    if not any(statuses):
        return
    at = [] if times is None or own.error is None else [float(times[0]), float(times[-1])]
    said = json.dumps([at, f"{type(own.error).__name__}: {own.error}"[: TEXT // 2] if own.error is not None else ""])
    notes = [json.loads(text) for text in ranks.exchange_text(said)]
    # an interrupt ends everything; calling with fewer rows helps only where nothing else is wrong
    kind = INTERRUPT if INTERRUPT in statuses else next((s for s in statuses if s not in (OK, MEMORY)), MEMORY)
    rank = statuses.index(kind)
    at, text = notes[rank]
    where = f" at timesteps {at[0]:g} to {at[1]:g}" if at else ""
    error: BaseException
    if kind == INTERRUPT:
        error = KeyboardInterrupt(f"rank {rank}")
    elif kind == MEMORY:
        error = torch.OutOfMemoryError(f"rank {rank} is out of memory{where}: {text}")
    elif kind == OUTPUT:
        error = ModelOutputError(f"rank {rank}{where}: {text.partition(': ')[2]}")
    else:
        error = RankError(f"rank {rank} failed{where}: {text}", rank=rank, timestep=at[0] if at else None)
    raise ranks.agreed(error) from own.error
