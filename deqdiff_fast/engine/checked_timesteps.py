"""What solves have seen of a model at the timesteps that rounds on nodes leave out.

Rounds on nodes take a model to be smooth in time. The first solve of a model along a schedule looks whether that is so:
it asks one sample about so many timesteps that what lies between two of them could not move the sample by more than the
tolerance, even if the predictions there were wrong by their own size. Solves after it ask two timesteps each, all of
them in turn. Where one was not as expected, this and the next solves are made on all timesteps, and then the model is
looked at anew.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .._locks import Lock
from ..model.knowledge import signature_of, variant_of
from ..nodes.grid import error_weight
from ..nodes.problem import NodeOutcome, Spots
from ..schedule.cache import cached
from .options import Options

LEFT_OUT = 1.0  # times the tolerance: how far timesteps between two that are asked could move a sample at most
AFTERWARDS = 2  # timesteps that a solve asks once all have been seen
GOLDEN = 0.6180339887498949  # multiples of it spread out evenly
MOST_FAILURES = 6  # beyond which the number of solves on all timesteps is no longer doubled

_LOCK = Lock()  # solves of several threads


class CheckedTimesteps:
    """Of one model, for one kind of conditions, along one schedule.

    Args:
        weight: (T,), how far an error in the prediction at each timestep may move the sample, see `error_weight`.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.tol = torch.full_like(weight, math.inf)  # for which each was seen to be as expected
        self.hidden = set[int]()  # which every solve is to ask
        self.solves, self.failures, self.waiting = 0, 0, 0

    def skip_nodes(self) -> bool:
        """Whether this solve is to be made on all timesteps, for the model was not smooth a short while ago."""
        with _LOCK:
            self.waiting -= self.waiting > 0
            return self.waiting > 0

    def spots(self, tol: float, batch: int) -> Spots:
        """What the next solve is to ask beside its nodes."""
        with _LOCK:
            number, steps = self.solves, len(self.weight)
            self.solves += 1
            unseen = (needed(self.weight, LEFT_OUT * tol) & (self.tol > tol)).nonzero()[:, 0].tolist()
            turn = (int((AFTERWARDS * number + k) * GOLDEN % 1 * steps) for k in range(AFTERWARDS))
            asked = tuple(sorted({*(unseen or turn), *self.hidden}))
            return Spots(asked, number % batch, tuple(self.hidden))

    def learn(self, spots: Spots, outcome: NodeOutcome, tol: float, hidden: Iterable[int] = ()) -> None:
        """What that solve has seen there. hidden: where every solve is to look, for its nodes may pass over it."""
        with _LOCK:
            if outcome.rough:
                self.failures = min(self.failures + 1, MOST_FAILURES)
                self.waiting = 2**self.failures
                self.tol = torch.full_like(self.weight, math.inf)
                self.hidden.clear()
            elif outcome.rough is not None:
                self.hidden.update(hidden)
                seen = list(spots.timesteps)
                self.tol = self.tol.clone()  # nobody may write to one that was made under `torch.inference_mode`
                self.tol[seen] = self.tol[seen].clamp_max(tol)
                self.failures = 0


def needed(weight: Tensor, most: float) -> Tensor:
    """(T,) bool: as few timesteps as leave no more than `most` of the weight between two of them."""
    reached = (weight / most).cumsum(0).floor()
    return reached.diff(prepend=reached.new_zeros(1)) > 0


def checked_timesteps(options: Options, noise: Tensor, model_kwargs: dict[str, Any] | None) -> CheckedTimesteps:
    """What is known for such solves."""
    schedule = options.schedule
    weight = cached(schedule, "error weight", lambda: error_weight(schedule))
    chain = cached(schedule, "checked", lambda: (*schedule.timesteps.tolist(), *weight.tolist()))  # eta included
    norm = None if options.weight is None else options.weight.key
    key = ("timesteps", chain, norm, variant_of(options.model), signature_of(noise, model_kwargs))
    known: CheckedTimesteps = options.knowledge.setdefault(key, CheckedTimesteps(weight))
    return known
