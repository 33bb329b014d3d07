"""Device work recorded once and replayed: CUDA graphs of the model's calls and of the solver's steps.

A round is two pieces of device work with fixed addresses: the model on a padded number of rows, and everything that
follows, which repeats with the period of the solver's history. So a few graphs, one for each size and one for each
position in the history, are all rounds of all solves of one shape.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from ..model.padding import out_of_memory
from .cuda_recorder import LATER, Recorder, Work, no_autocast_cache
from .replay_check import ReplayCheck

_log = logging.getLogger("deqdiff_fast")

Key = tuple[str, int]
COUNTERS = ("model_calls", "model_evals")


class CountedModel(Protocol):
    """What a "model" piece calls."""

    model_calls: int
    model_evals: int
    shrinks: bool
    """Whether it answers a lack of memory with smaller calls, from then on."""


class Graphs:
    """Runs pieces of device work: as they are the first time, recorded from the second time on.

    That second time a piece is done plainly as well, on the same memory, and the first replay must reproduce it: it may
    do something that a recording does not see. If it does not, or cannot be recorded, it is called plainly from then
    on, and the log says why.

    Args:
        outputs: what a "model" piece writes, and does not read.
        memory: what any other piece may write to.
        model: its counters are what a replayed piece would otherwise not count.
    """

    def __init__(self, recorder: Recorder, outputs: Tensor, memory: Sequence[Tensor], model: CountedModel) -> None:
        self.recorder, self.outputs, self.memory, self.model = recorder, outputs, memory, model
        self.replays: dict[Key, tuple[Work, list[int]]] = {}
        self.seen: set[Key] = set()
        self.refused: dict[str | Key, str] = {}
        """A kind of work, or one piece -> why it is not recorded."""

    def replay(self, key: Key, work: Work) -> None:
        """Do `work`, which asks the same of the device whenever it comes under this key."""
        if key in self.replays:
            recorded, counted = self.replays[key]
            recorded()
            self._count([before + more for before, more in zip(self._counts(), counted)])
        elif key not in self.seen or key[0] in self.refused or key in self.refused:
            self.seen.add(key)  # the first call is plain: libraries and kernels set themselves up in it
            work()
        else:
            self._first(key, work)

    def give_up_model(self) -> bool:
        """Free what was recorded, for there is no room for it beside plain calls, and record no more calls of the
        model. Returns whether anything was."""
        had = bool(self.replays)
        self.replays.clear()
        self.recorder.reset()
        if had:
            self.refuse("model", "there is no memory for that beside plain calls")
        return had

    def _first(self, key: Key, work: Work) -> None:
        before, shrinks = self._counts(), self.model.shrinks
        self.model.shrinks = False  # a lack of memory here is the recording's, not the model's
        try:
            with no_autocast_cache():
                self._record(key, work)
            return
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
        finally:
            self.model.shrinks = shrinks
        self.refuse(key, "out of memory")  # not before the error, and the memory that it holds on to, is gone
        self._count(before)
        work()

    def _record(self, key: Key, work: Work) -> None:
        """The work, then its recording on the same memory; where there is no room for that, all is as it was."""
        is_model, before = key[0] == "model", self._counts()
        check = ReplayCheck([self.outputs] if is_model else self.memory, rewritten=is_model)
        try:
            reason = self.recorder.run(work)
            after = self._counts()
            if reason is not None:
                check.finish(False)
                if reason != LATER:
                    self.refuse(key[0], reason)
                return
            check.work_done()
            replay = self._capture(key, work)
        except BaseException:
            check.undo()
            raise
        self._count(after)
        if replay is None:
            check.finish(True)
            return
        replay()
        agrees = check.agrees()
        check.finish(not agrees)
        if agrees:
            self.replays[key] = replay, [now - then for now, then in zip(after, before)]
        elif agrees is not None:
            self.refuse(key[0], "a replay does not reproduce the call: it depends on more than its inputs")

    def _capture(self, key: Key, work: Work) -> Work | None:
        """What repeats the work, None where it cannot be recorded; raises only where there is no memory for that."""
        try:
            return self.recorder.record(work)
        except Exception as error:
            if isinstance(error, RuntimeError) and out_of_memory(error):
                raise
            self.refuse(key[0], f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}")
        return None

    def _counts(self) -> list[int]:
        return [getattr(self.model, name) for name in COUNTERS]

    def _count(self, values: list[int]) -> None:
        for name, value in zip(COUNTERS, values):
            setattr(self.model, name, value)

    def refuse(self, what: str | Key, reason: str) -> None:
        """Record no such kind of work, or not that piece, from now on, and forget what was recorded of it."""
        self.refused[what] = reason
        for key in [key for key in self.replays if what in (key, key[0])]:
            del self.replays[key]
        named = what if isinstance(what, str) else f"{what[0]} ({what[1]})"
        _log.warning("cuda_graph: the %s is not recorded (%s); it is called plainly", named, reason)
