"""Workspaces that outlive a solve, with the device work that was recorded on their memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from .._locks import Lock
from ..loop.device_state import DeviceState
from ..loop.task import Replay, run_eager
from ..model.padding import is_compiled
from .cuda_graphs import Graphs
from .cuda_recorder import CudaRecorder, Recorder
from .graph_key import SolveKey, Weights, solve_key
from .system import System
from .workspace import Workspace

CACHED = 2  # workspaces a sampler holds on to; each is a slab of device memory and a pool of graphs
REMEMBERED = 64  # shapes that "auto" has met once
NO_ADDRESS = "the model is not recorded (it has weights without an address); it is called plainly"

_log = logging.getLogger("deqdiff_fast")


@dataclass
class CachedSolve:
    """A workspace with the device work that was recorded on its memory."""

    work: Workspace
    graphs: Graphs
    state: DeviceState
    kwargs: list[Any]

    def tensors(self) -> list[Tensor]:
        """All memory that outlives a solve."""
        device = self.work.system.device
        kwargs = [value for value in self.kwargs if isinstance(value, Tensor) and value.device == device]
        return [*self.work.tensors(), *self.state, *kwargs]


def recorder_for(device: torch.device) -> Recorder | None:
    """What records on that device; None where nothing does."""
    return CudaRecorder(device) if device.type == "cuda" else None


class GraphCache:
    """The cached solves of one sampler, by all that a recording depends on. A solve that finds the one it needs in use
    by another thread gets plain memory."""

    def __init__(self, mode: bool | str) -> None:
        self.mode = mode
        self._cached: dict[Any, CachedSolve] = {}
        self._seen: set[Any] = set()
        self._told = False
        self._lock = Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.mode,)  # a copy records its own

    @contextmanager
    def acquire(
        self, system: System, settings: tuple[Any, ...], open_workspace: Callable[[System], Workspace], recorded: bool
    ) -> Iterator[tuple[Workspace, Replay, DeviceState | None]]:
        """A workspace for the system, how its device work is run, and the loop's memory on the device.

        Args:
            settings: what the work depends on besides the system.
            open_workspace: leases one.
            recorded: whether device work may be recorded.
        """
        recorder = recorder_for(system.device) if recorded and self.mode is not False else None
        if self.mode is True and recorder is None and system.device.type != "cuda":
            raise ValueError(f"cuda_graph: expected noise on a CUDA device for True, got {system.device}; use 'auto'")
        key = None if recorder is None else self._key(system, settings)
        entry, met = (None, False) if key is None else self._take(key.now())
        if recorder is None or key is None or not (self.mode is True or met or entry is not None):
            work = open_workspace(system)
            with work.lease:
                yield work, run_eager, None
            if key is not None:
                self._remember(key.now())
            return
        entry = self._renew(entry, system) if entry is not None else self._make(system, open_workspace, recorder)
        try:
            yield entry.work, entry.graphs.replay, entry.state
        except BaseException:  # what was under way may be half done
            entry.work.lease.release()
            raise
        entry.graphs.recorder.leave()
        self._keep(entry, key.now())

    def on_shortage(self, graphs: Graphs | None = None) -> Callable[[], bool]:
        """What to do where a call of the model finds no memory: free that of cached solves that are not in use, and
        what `graphs` has recorded. It returns whether there was any, and keeps neither of them alive."""
        cache, recorded = ref(self), (lambda: None) if graphs is None else ref(graphs)

        def give_way() -> bool:
            mine, used = cache(), recorded()
            freed = mine is not None and mine._drop()
            return (used is not None and used.give_up_model()) or freed

        return give_way

    def _drop(self) -> bool:
        """Free all that is not in use; returns whether there was anything."""
        with self._lock:
            unused, self._cached = list(self._cached.values()), {}
        for entry in unused:
            entry.work.lease.release()
        return bool(unused)

    def _take(self, key: Any) -> tuple[CachedSolve | None, bool]:
        """The cached solve of that key, if there is one that is not in use, and whether the key was met before."""
        with self._lock:
            met, entry = key in self._seen, self._cached.pop(key, None)
        self._remember(key)
        return entry, met

    def _remember(self, key: Any) -> None:
        with self._lock:
            self._seen = self._seen if len(self._seen) < REMEMBERED else set()
            self._seen.add(key)

    def _keep(self, entry: CachedSolve, key: Any) -> None:
        """Cache a solve that has ended; the oldest goes."""
        self._remember(key)
        with self._lock:
            left = self._cached.pop(key, None)
            self._cached[key] = entry
            dropped = [] if left is None else [left]
            while len(self._cached) > CACHED:
                dropped.append(self._cached.pop(next(iter(self._cached))))
        for other in dropped:
            other.work.lease.release()

    def _key(self, system: System, settings: tuple[Any, ...]) -> SolveKey | None:
        """All that a recording depends on, or None for a model that is left alone."""
        model = system.model
        if self.mode == "auto" and (not isinstance(model, nn.Module) or model.training or is_compiled(model)):
            return None
        weights = Weights.of(model)
        if weights is None:
            (_log.debug if self._told else _log.warning)("cuda_graph: %s", NO_ADDRESS)
            self._told = True
            return None
        return SolveKey(solve_key(system, settings), weights)

    def _make(self, system: System, open_workspace: Callable[[System], Workspace], recorder: Recorder) -> CachedSolve:
        leaves, structure = tree_flatten(system.model_kwargs)
        kwargs = [x.detach().clone() if isinstance(x, Tensor) else x for x in leaves]
        system.model_kwargs = tree_unflatten(kwargs, structure)
        system.padded = True
        work = open_workspace(system)
        state = DeviceState.make(work.chain, system.pad_round(work.chain.window * system.batch))
        memory = [*work.tensors(scratch=False), *state]
        graphs = Graphs(recorder, work.lease["predictions"], memory, system)
        system.give_way = self.on_shortage(graphs)
        entry = CachedSolve(work, graphs, state, kwargs)
        recorder.enter(entry.tensors())
        return entry

    def _renew(self, entry: CachedSolve, system: System) -> CachedSolve:
        """The same memory for another solve: new conditions in the old places, nothing remembered."""
        entry.graphs.recorder.enter(entry.tensors())
        for target, value in zip(entry.kwargs, tree_flatten(system.model_kwargs)[0]):
            if isinstance(target, Tensor):
                target.copy_(value)
        old = entry.work.system
        old.model_evals = old.model_calls = 0
        before = _places(entry.work.memory)
        entry.work.restart()
        if "step" not in entry.graphs.refused and _places(entry.work.memory) != before:
            entry.graphs.refuse("step", "the solver has memory of its own, elsewhere in each solve")
        return entry


def _places(memory: Any) -> list[int]:
    """Where the tensors of a solver's memory are."""
    leaves = tree_leaves(list(vars(memory).values()) if is_dataclass(memory) else memory)
    return [leaf.data_ptr() for leaf in leaves if isinstance(leaf, Tensor)]
