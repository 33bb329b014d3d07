"""Device work recorded once and replayed: CUDA graphs of the model's calls and of the solver's steps.

A round is two pieces of device work with fixed addresses: the model on a padded number of rows, and everything that
follows, which repeats with the period of the solver's history. So a few graphs, one for each size and one for each
position in the history, are all rounds of all solves of one shape.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

_log = logging.getLogger("deqdiff_fast")

Work = Callable[[], None]
Key = tuple[str, int]
AGREES = 5e-3  # relative L2: a replay that differs by more from the call it recorded did not record all of it


class Recorder(Protocol):
    def record(self, work: Work) -> Work:
        """Note what `work` asks of the device, without doing it; returns what does it. Raises where it cannot."""
        ...


class CudaRecorder:
    """CUDA graphs that share one pool of memory: they run one after the other."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool: Any = None

    def record(self, work: Work) -> Work:
        graph: Any = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device), torch.cuda.graph(graph, pool=self.pool):
            work()
        self.pool = graph.pool() if self.pool is None else self.pool

        def replay() -> None:
            with torch.cuda.device(self.device):  # a graph is launched on the current device's current stream
                graph.replay()

        return replay


class Graphs:
    """Runs pieces of device work: as they are the first time, recorded from the second time on.

    outputs: what a "model" piece writes. Its first replay must reproduce the plain call, for a model may do something
    that a recording does not see; if it does not, or cannot be recorded, it is called plainly, and the log says why.
    counters: (object, name of an int attribute), ...: what a replayed piece would otherwise not count.
    """

    def __init__(self, recorder: Recorder, outputs: Tensor, counters: Sequence[tuple[Any, str]]) -> None:
        self.recorder, self.outputs, self.counters = recorder, outputs, counters
        self.replays: dict[Key, tuple[Work, list[int]]] = {}
        self.seen: set[Key] = set()
        self.refused: dict[str, str] = {}
        """Kind of work -> why it is not recorded."""

    def replay(self, key: Key, work: Work) -> None:
        """Do `work`, which asks the same of the device whenever it comes under this key."""
        if key in self.replays:
            recorded, counted = self.replays[key]
            recorded()
            self._count([before + more for before, more in zip(self._counts(), counted)])
        elif key not in self.seen or key[0] in self.refused:
            self.seen.add(key)  # the first call is plain: libraries and kernels set themselves up in it
            work()
        else:
            self._first(key, work)

    def _first(self, key: Key, work: Work) -> None:
        before = self._counts()
        try:
            replay = self.recorder.record(work)
        except Exception as error:
            self._refuse(key[0], f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}")
            self._count(before)
            work()
            return
        entry = (replay, [after - start for after, start in zip(self._counts(), before)])
        if key[0] != "model":
            self.replays[key] = entry
            replay()
            return
        self._count(before)
        work()
        expected = self.outputs.nan_to_num()
        replay()
        apart = (self.outputs.nan_to_num() - expected).double().norm()
        if bool(apart <= AGREES * expected.double().norm()):
            self.replays[key] = entry
        else:
            self._refuse(key[0], "a replay does not reproduce the call: the model depends on more than its inputs")
            self._count(before)
            work()

    def _counts(self) -> list[int]:
        return [getattr(*counter) for counter in self.counters]

    def _count(self, values: list[int]) -> None:
        for (owner, name), value in zip(self.counters, values):
            setattr(owner, name, value)

    def _refuse(self, kind: str, reason: str) -> None:
        self.refused[kind] = reason
        for key in [key for key in self.replays if key[0] == kind]:
            del self.replays[key]
        _log.warning("cuda_graph: the %s is not recorded (%s); it is called plainly", kind, reason)
