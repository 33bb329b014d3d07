"""Workspaces that outlive a solve, with the device work that was recorded on their memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from .._locks import Lock
from ..loop.device_state import DeviceState
from ..loop.task import Replay, run_eager
from ..model.padding import is_compiled
from .cuda_graphs import CudaRecorder, Graphs, Recorder
from .system import System
from .workspace import Workspace

CACHED = 2  # workspaces a sampler holds on to; each is a slab of device memory and a pool of graphs
REMEMBERED = 64  # shapes that "auto" has met once


@dataclass
class CachedSolve:
    """A workspace with the device work that was recorded on its memory."""

    work: Workspace
    graphs: Graphs
    state: DeviceState
    kwargs: list[Any]


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
        entry = None
        with self._lock:
            if key is not None and (self.mode is True or key in self._seen):
                entry = self._cached.pop(key, None)
            wanted = recorder is not None and (self.mode is True or key in self._seen)
            if key is not None:
                self._seen = self._seen if len(self._seen) < REMEMBERED else set()
                self._seen.add(key)
        if recorder is None or not wanted:
            work = open_workspace(system)
            with work.lease:
                yield work, run_eager, None
            return
        entry = self._renew(entry, system) if entry is not None else self._make(system, open_workspace, recorder)
        try:
            yield entry.work, entry.graphs.replay, entry.state
        except BaseException:  # what was under way may be half done
            entry.work.lease.release()
            raise
        with self._lock:
            self._cached[key] = entry
            while len(self._cached) > CACHED:
                self._cached.pop(next(iter(self._cached))).work.lease.release()

    def _key(self, system: System, settings: tuple[Any, ...]) -> Any:
        """All that a recording depends on, or None for a model that "auto" leaves alone."""
        model = system.model
        if self.mode == "auto" and (not isinstance(model, nn.Module) or model.training or is_compiled(model)):
            return None
        leaves, structure = tree_flatten(system.model_kwargs)
        shapes = tuple(
            (tuple(x.shape), x.dtype, x.device) if isinstance(x, Tensor) else (type(x), repr(x)) for x in leaves
        )
        held = [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []
        addresses = hash(tuple((x.data_ptr(), x.dtype) for x in held))
        return (
            system.batch, system.shape, system.model_dtype, system.device, system.max_batch, str(structure), shapes,
            addresses, torch.is_autocast_enabled(system.device.type), settings,
        )  # fmt: skip

    def _make(self, system: System, open_workspace: Callable[[System], Workspace], recorder: Recorder) -> CachedSolve:
        leaves, structure = tree_flatten(system.model_kwargs)
        kwargs = [x.detach().clone() if isinstance(x, Tensor) else x for x in leaves]
        system.model_kwargs = tree_unflatten(kwargs, structure)
        system.padded = True
        work = open_workspace(system)
        state = DeviceState.make(work.chain, system.pad_round(work.chain.window * system.batch))
        counters: list[tuple[Any, str]] = [(system, "model_calls"), (system, "model_evals")]
        return CachedSolve(work, Graphs(recorder, work.lease["predictions"], counters), state, kwargs)

    def _renew(self, entry: CachedSolve, system: System) -> CachedSolve:
        """The same memory for another solve: new conditions in the old places, nothing remembered."""
        for target, value in zip(entry.kwargs, tree_flatten(system.model_kwargs)[0]):
            if isinstance(target, Tensor):
                target.copy_(value)
        old = entry.work.system
        old.model_evals = old.model_calls = 0
        entry.work.restart()
        return entry
